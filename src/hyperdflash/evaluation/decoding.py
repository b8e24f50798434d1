"""Measures methods by decoding: every method on each prompt in turn, timed, in one process.

1. methods      plain autoregressive decoding (AR), then those of the configuration
2. decode       evaluation.conversations, each turn by the draft-verify loop
3. check        T = 0: the text equals AR's, or the gap of the logits is that of a tie
4. report       from rows.jsonl the paper's tables, Figure 1 and the cost of a round (evaluation.decoding_report)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.agreement import compare_greedy
from hyperdflash.decoding.loop import decode
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.drafting.proposer import Autoregressive, Proposer
from hyperdflash.evaluation.agreement import agreement_markdown, agreements
from hyperdflash.evaluation.conversations import answer_all
from hyperdflash.evaluation.decoding_report import report
from hyperdflash.evaluation.methods import Method, make_methods
from hyperdflash.evaluation.turn_rows import as_generation, read_rows, turn_row
from hyperdflash.preparing.job import StatesJob
from hyperdflash.report.measure import AUTOREGRESSIVE as AR
from hyperdflash.settings import natural_int, positive_int
from hyperdflash.targets.load import Target
from hyperdflash.targets.sampling import Sampler, generator_for


def evaluate_by_decoding(config: DictConfig) -> Path:
    """Decodes, then writes the report; returns the folder."""
    natural_int("seed", config.seed)
    for name in ("replay_draws", "num_resamples"):
        positive_int(name, config[name])
    if config.threads:
        torch.set_num_threads(config.threads)
    methods = make_methods(config)
    target = StatesJob(config).load()
    tokenizer = load_tokenizer(config.target.path)
    modules = {method.name: method.drafter(config, target.heads) for method in methods}
    rows = list(read_rows(decode_all(config, methods, modules, target, tokenizer)))
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
    modules: dict[str, DraftModel],
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Writes rows.jsonl of every method on every prompt; ``modules``: method name -> drafter."""
    benchmark: Prompts = instantiate(config.benchmarks)
    stop_ids = {special_ids(tokenizer, config.target.mask_token_id).eos}
    drafters: dict[str, Proposer] = {AR: Autoregressive()}
    drafters |= {m.name: m.loop_drafter(config, target.heads, modules[m.name]) for m in methods}
    rows = read_rows(Path(config.out) / "rows.jsonl")
    asked = Counter((row["mode"], row["benchmark"]) for row in rows if "generate" in row)

    def answer(name: str, prompt_ids: list[int], temperature: float, draws: str) -> dict:
        """Decodes one answer; ``draws`` alone seeds its draws, so earlier answers do not matter."""
        generation = decode(
            target.model,
            drafters[name],
            prompt_ids,
            stop_ids=stop_ids,
            max_new_tokens=benchmark.max_new_tokens,
            sampler=Sampler(temperature, config.top_p, generator_for(draws, target.model.device)),
            synchronize=target.model.device.type == "cuda",
        )
        return turn_row(prompt_ids, generation)

    def complete(row: dict) -> None:
        if row["temperature"] == 0:
            compare_texts(target.model, row["methods"])
            group = (row["mode"], row["benchmark"])
            if asked[group] < config.generate_prompts:
                asked[group] += 1
                row["generate"] = plain_generate(target.model, row["methods"][AR][0], benchmark.max_new_tokens, stop_ids)

    identity = {
        "target": target.fingerprint,
        "dtype": config.target.dtype,
        "cache.dtype": config.cache.dtype,
        "methods": {method.name: method.run_id for method in methods},
        "threads": torch.get_num_threads(),
        "device": str(target.model.device),
    }
    return answer_all(config, identity, benchmark, tokenizer, list(drafters), answer, complete=complete)


def compare_texts(model: PreTrainedModel, rows: dict[str, list[dict]]) -> None:
    """Adds ``differs`` to every turn whose greedy text is not AR's: position, gap of the logits, and whether it is a tie.

    Turns after a difference have another history, so ``compared`` is False there.
    """
    for turns in rows.values():
        parted = False
        for index, turn in enumerate(turns):
            if parted:
                turn["compared"] = False
                continue
            found = compare_greedy(model, turn["prompt_ids"], tuple(rows[AR][index]["ids"]), tuple(turn["ids"]))
            if found is not None:
                turn["differs"], parted = asdict(found), True


@torch.inference_mode()
def plain_generate(model: PreTrainedModel, turn: dict, max_new_tokens: int, stop_ids: set[int]) -> dict:
    """Times transformers' ``generate()`` on the prompt of ``turn`` beside the AR loop, prefill included."""
    prompt_ids, own = turn["prompt_ids"], as_generation(turn)
    started = time.perf_counter()
    text = model.generate(
        torch.tensor([prompt_ids], device=model.device),
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
