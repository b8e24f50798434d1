"""Runs every method on every prompt, resumable, for an evaluation by decoding or by a serving engine.

1. places       the prompts that fit (data.prompts), mode by mode and temperature by temperature
2. converse     per prompt all methods, in rotating order; every turn continues the history that its method wrote
3. rows.jsonl   one line per prompt after its last method (evaluation.turn_rows): a kill loses one prompt
4. samples_of   lines -> a Sample per method, benchmark, mode and temperature (hyperdflash.report.measure)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hyperdflash.cli import command_of
from hyperdflash.data.chat import Mode, encode_rounds, history_after
from hyperdflash.data.prompts import Prompts
from hyperdflash.decoding.repetition import ends_in_loop
from hyperdflash.evaluation.turn_rows import Rows
from hyperdflash.record import environment_record, write_json
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.measure import Sample
from hyperdflash.report.paper import columns_of, write_paper_report

Answer = Callable[[str, list[int], float, str], dict]  # method, prompt ids, temperature, name of its draws -> a turn's row


def answer_all(
    config: DictConfig,
    identity: dict,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[str],
    answer: Answer,
    *,
    prepare: Callable[[list[int]], None] = lambda prompt_ids: None,
    complete: Callable[[dict], None] = lambda row: None,
) -> Path:
    """Runs every method on every prompt, mode and temperature that rows.jsonl lacks; returns its path.

    ``identity`` decides the rows, with the seed, the methods and the prompts. ``prepare`` takes the first prompt's ids
    where any prompt is left, before the file's header names the methods; ``complete`` takes each row before it is written.
    """
    modes: list[Mode] = list(config.mode) if OmegaConf.is_list(config.mode) else [config.mode]
    places = [
        (mode, float(temperature), prompt)
        for mode in modes
        for fitting in [prompts.fitting(tokenizer, mode)]
        for temperature in config.temperature
        for prompt in fitting
    ]
    shared = {"benchmarks": OmegaConf.to_container(config.benchmarks, resolve=True), "top_p": config.top_p, "seed": config.seed}
    rows = Rows(Path(config.out) / "rows.jsonl", {**identity, **shared})
    left = [place for place in places if (place[0], place[1], place[2].id) not in rows.done]
    if left:
        prepare(encode_rounds(places[0][2], tokenizer, places[0][0])[0])
    rows.start()
    if len(left) < len(places):
        print(f"{len(places) - len(left)} of {len(places)} prompts are in {rows.path} already", flush=True)
    with tqdm(total=len(places), initial=len(places) - len(left), desc="decode", unit="prompt", mininterval=2) as bar:
        for index, (mode, temperature, prompt) in enumerate(left):
            turns = {}
            for name in [*methods[index % len(methods) :], *methods[: index % len(methods)]]:
                bar.set_postfix_str(f"{prompt.domain} T={temperature:g} {name}", refresh=False)
                draws = f"{config.seed}:{mode}:{temperature}:{prompt.id}:{name}"
                turns[name] = converse(
                    lambda prompt_ids, turn, n=name, t=temperature, d=draws: answer(n, prompt_ids, t, f"{d}:{turn}"),
                    encode_rounds(prompt, tokenizer, mode),
                    tokenizer,
                    mode,
                )
            row = {"mode": mode, "temperature": temperature, "benchmark": prompt.domain, "id": prompt.id}
            row["methods"] = {name: turns[name] for name in methods}
            complete(row)
            rows.append(row)
            bar.update()
    return rows.path


def converse(
    answer: Callable[[list[int], int], dict], rounds: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, mode: Mode
) -> list[dict]:
    """Answers every user turn in order; ends early where an answer reaches its length limit.

    ``answer`` takes the prompt's ids and the turn's number, and returns a row with ``ids`` and ``ended_by``.
    """
    turns, before = [], []
    for number, added in enumerate(rounds):
        prompt_ids = [*before, *added]
        turns.append(answer(prompt_ids, number))
        if turns[-1]["ended_by"] == "length":  # nothing can follow a cut answer
            break
        before = history_after(prompt_ids, turns[-1]["ids"], tokenizer, mode)
    return turns


def samples_of(
    rows: Sequence[dict],
    seed: int,
    eos_id: int,
    runs: dict[str, str],
    count: Callable[[str, list[list[dict]]], tuple[PromptCounts, list[float]]],
) -> list[Sample]:
    """Returns a sample per method, benchmark, mode and temperature, summed over a prompt's turns.

    ``count``: a method and the turns of each of N prompts -> its counts and the seconds of decoding of each prompt.
    """
    parts: dict[tuple, list[dict]] = {}
    for row in rows:
        parts.setdefault((row["mode"], row["temperature"], row["benchmark"]), []).append(row)
    found = []
    for (mode, temperature, benchmark), prompts in parts.items():
        for name in prompts[0]["methods"]:
            turns = [row["methods"][name] for row in prompts]
            counts, seconds = count(name, turns)
            found.append(
                Sample(
                    method=name,
                    temperature=temperature,
                    prompt_ids=tuple(row["id"] for row in prompts),
                    groups=(benchmark,) * len(prompts),
                    counts=counts,
                    looped=np.array([any(ends_in_loop(t["ids"], end_token_id=eos_id) for t in own) for own in turns]),
                    run=runs.get(name, ""),
                    mode=mode,
                    seconds=np.array(seconds),
                    seeds=(seed,),
                )
            )
    return found


def write_tables(
    samples: Sequence[Sample], config: DictConfig, target: str, methods: Sequence[str], figures: bool = True
) -> list[Path]:
    """Writes paper.md and its companions, with rows for ``methods`` even where nothing was measured."""
    columns = columns_of([name for s in samples for name in s.groups])
    return write_paper_report(samples, config.out, target, columns, methods, config.num_resamples, config.seed, figures)


def write_evaluation(config: DictConfig, fingerprint: str, num_prompts: int, **more: object) -> Path:
    """Writes evaluation.json: target, prompts, command and code."""
    path = Path(config.out) / "evaluation.json"
    record = {"target": {"path": str(config.target.path), "fingerprint": fingerprint}, "prompts": num_prompts, **more}
    write_json(path, record | {"environment": environment_record(command_of("src.evaluate"))})
    return path
