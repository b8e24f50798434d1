"""Measure methods by decoding with them: each prompt by every method in turn, timed, in one process.

1. methods      plain autoregressive decoding (AR), then those of the configuration
2. prompts      the ones that fit (data.lengths), mode by mode and temperature by temperature
3. decode       prompt by prompt all methods, another one first each time; every turn on the history its method wrote
4. check        T = 0: the text is AR's; where it is not, the gap of the logits says whether that is a tie
5. rows.jsonl   one line a prompt, appended once all methods are done (evaluation.turn_rows): a kill loses one prompt
6. report       the paper's tables, Figure 1 and where the time goes, all from rows.jsonl (evaluation.decoding_report)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyperdflash.data.chat import Mode, encode_rounds, history_after
from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.agreement import compare_greedy
from hyperdflash.decoding.loop import Generation, decode
from hyperdflash.decoding.proposers import Autoregressive, LoopDrafter
from hyperdflash.decoding.replay import ReplayDrafter
from hyperdflash.evaluation.agreement import agreement_markdown, agreements
from hyperdflash.evaluation.decoding_report import report
from hyperdflash.evaluation.methods import Method, make_methods
from hyperdflash.evaluation.turn_rows import Rows, read_rows, turn_row
from hyperdflash.preparing.states import lazy_target
from hyperdflash.report.records import AUTOREGRESSIVE
from hyperdflash.settings import natural_int, positive_int
from hyperdflash.targets.load import Target
from hyperdflash.targets.sampling import Sampler, generator_for

AR = AUTOREGRESSIVE


def evaluate_by_decoding(config: DictConfig) -> Path:
    """Decode, then write the report; returns the folder."""
    natural_int("seed", config.seed)
    for name in ("replay_draws", "num_resamples"):
        positive_int(name, config[name])
    if config.threads:
        torch.set_num_threads(config.threads)
    modes = list(config.mode) if OmegaConf.is_list(config.mode) else [config.mode]
    methods = make_methods(config)
    target = lazy_target(config)()
    tokenizer = load_tokenizer(config.target.path)
    modules = {method.name: method.drafter(config, target.heads) for method in methods}
    rows = list(read_rows(decode_all(config, methods, modules, target, tokenizer, modes)))
    eos_id = special_ids(tokenizer, config.target.mask_token_id).eos
    report(rows, config, {method.name: method.run_id for method in methods}, target.fingerprint, eos_id)
    if config.check_replay:
        text = agreement_markdown(agreements(rows, methods, modules, target, config))
        (Path(config.out) / "agreement.md").write_text(text)
        print(text)
    return Path(config.out)


def decode_all(
    config: DictConfig,
    methods: Sequence[Method],
    modules: dict[str, ReplayDrafter],
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    modes: Sequence[Mode],
) -> Path:
    """Every method on every prompt, mode and temperature; what is already in rows.jsonl is not done again.

    ``modules`` a method's drafter by its name.
    """
    benchmark: Prompts = instantiate(config.benchmarks)
    stop_ids = {special_ids(tokenizer, config.target.mask_token_id).eos}
    drafters: dict[str, LoopDrafter] = {AR: Autoregressive()}
    drafters |= {m.name: m.loop_drafter(config, target.heads, modules[m.name]) for m in methods}
    rows = Rows(
        Path(config.out) / "rows.jsonl",
        {
            "target": target.fingerprint,
            "dtype": config.target.dtype,
            "cache.dtype": config.cache.dtype,
            "benchmarks": OmegaConf.to_container(config.benchmarks, resolve=True),
            "methods": {method.name: method.run_id for method in methods},
            "top_p": config.top_p,
            "seed": config.seed,
            "threads": torch.get_num_threads(),
            "device": str(target.model.device),
        },
    )
    todo = [
        (mode, float(temperature), prompt)
        for mode in modes
        for prompts in [benchmark.fitting(tokenizer, mode)]
        for temperature in config.temperature
        for prompt in prompts
    ]
    left = [(m, t, p) for m, t, p in todo if (m, t, p.id) not in rows.done]
    if len(left) < len(todo):
        print(f"{len(todo) - len(left)} of {len(todo)} prompts are in {rows.path} already", flush=True)
    asked = Counter((row["mode"], row["benchmark"]) for row in read_rows(rows.path) if "generate" in row)
    names = list(drafters)
    with tqdm(total=len(todo), initial=len(todo) - len(left), desc="decode", unit="prompt", mininterval=2) as bar:
        for index, (mode, temperature, prompt) in enumerate(left):
            decoded = {}
            for name in names[index % len(names) :] + names[: index % len(names)]:
                bar.set_postfix_str(f"{prompt.domain} T={temperature:g} {name}", refresh=False)
                decoded[name] = decode_conversation(
                    target.model,
                    drafters[name],
                    encode_rounds(prompt, tokenizer, mode),
                    tokenizer,
                    mode,
                    max_new_tokens=benchmark.max_new_tokens,
                    stop_ids=stop_ids,
                    temperature=temperature,
                    top_p=config.top_p,
                    draws=f"{config.seed}:{mode}:{temperature}:{prompt.id}:{name}",
                )
            row = {"mode": mode, "temperature": temperature, "benchmark": prompt.domain, "id": prompt.id}
            row["methods"] = {name: [turn_row(*turn) for turn in decoded[name]] for name in names}
            if temperature == 0:
                compare_texts(target.model, row["methods"], decoded)
                group = (mode, prompt.domain)
                if asked[group] < config.generate_prompts:
                    asked[group] += 1
                    prompt_ids, own = decoded[AR][0]
                    row["generate"] = plain_generate(target.model, prompt_ids, own, benchmark.max_new_tokens, stop_ids)
            rows.append(row)
            bar.update()
    return rows.path


def decode_conversation(
    model: PreTrainedModel,
    drafter: LoopDrafter,
    rounds: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    mode: Mode,
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float,
    top_p: float,
    draws: str,
) -> list[tuple[list[int], Generation]]:
    """Answer user turn after user turn -> (prompt ids, generation) of each; ends early where an answer was cut.

    ``draws`` names the draws: they depend on it and on the turn, not on what was decoded before.
    """
    turns, before = [], []
    for number, added in enumerate(rounds):
        prompt_ids = [*before, *added]
        generation = decode(
            model,
            drafter,
            prompt_ids,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            sampler=Sampler(temperature, top_p, generator_for(f"{draws}:{number}", model.device)),
            synchronize=model.device.type == "cuda",
        )
        turns.append((prompt_ids, generation))
        if generation.ended_by == "length":  # cut: nothing can follow
            break
        before = history_after(prompt_ids, generation.token_ids, tokenizer, mode)
    return turns


def compare_texts(
    model: PreTrainedModel, rows: dict[str, list[dict]], decoded: dict[str, list[tuple[list[int], Generation]]]
) -> None:
    """Write ``differs`` into every turn whose greedy text is not AR's: position, gap of the logits, and whether it is a tie.

    Turns after a difference have another history and cannot be compared: ``compared`` is False there.
    """
    for name, turns in decoded.items():
        parted = False
        for index, (turn, (prompt_ids, generation)) in enumerate(zip(rows[name], turns, strict=True)):
            if parted:
                turn["compared"] = False
                continue
            found = compare_greedy(model, prompt_ids, decoded[AR][index][1].token_ids, generation.token_ids)
            if found is not None:
                turn["differs"], parted = asdict(found), True


@torch.inference_mode()
def plain_generate(
    model: PreTrainedModel, prompt_ids: Sequence[int], own: Generation, max_new_tokens: int, stop_ids: set[int]
) -> dict:
    """transformers' own ``generate()`` on the same prompt, beside our AR loop: seconds of both, prefill included."""
    started = time.perf_counter()
    text = model.generate(
        torch.tensor([list(prompt_ids)], device=model.device),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=min(stop_ids),
    )[0, len(prompt_ids) :].tolist()
    seconds = time.perf_counter() - started
    return {
        "tokens": len(text),
        "seconds": seconds,
        "own_seconds": own.first.seconds.total + own.seconds.total,
        "same_text": tuple(text) == own.token_ids,
    }
