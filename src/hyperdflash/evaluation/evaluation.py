"""Measures methods by replay: the target's answers, their states, every method's rounds on the same texts.

1. methods      native MTP with n steps, or finished runs by the index
2. prompts      held-out prompts with the target's answers at each temperature, from disk or made once
3. states       with every layer that any method reads
4. replay       one pass per method and batch -> rounds -> counts per prompt
5. report       metrics.json, acceptance.md, acceptance.csv, acceptance.png, the table on the terminal
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from tqdm import tqdm

from hyperdflash.answers.exchange import AnswerSettings
from hyperdflash.cli import command_of
from hyperdflash.contracts import Document
from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import special_ids
from hyperdflash.decoding.metrics import document_counts
from hyperdflash.decoding.repetition import ends_in_loop
from hyperdflash.decoding.replay import concat_rounds, replay
from hyperdflash.evaluation.methods import baseline_of, make_methods
from hyperdflash.preparing.dataset import with_supervised_pair
from hyperdflash.preparing.job import StatesJob
from hyperdflash.record import environment_record, write_json
from hyperdflash.report.acceptance import acceptance_blocks, main_table, replay_results
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.figures import results_figure
from hyperdflash.report.measure import Sample
from hyperdflash.report.tables import jsonable, markdown, terminal_table
from hyperdflash.settings import natural_int, one_of
from hyperdflash.states.store import collate
from hyperdflash.targets.load import load_heads
from hyperdflash.training.datamodule import on_tensors


def evaluate_by_replay(config: DictConfig) -> dict:
    """Replays all methods; returns the content of metrics.json."""
    if OmegaConf.is_list(config.mode):
        raise ValueError(f"replay takes one mode, got mode={list(config.mode)}: mode=non_think does, by=decoding takes several")
    natural_int("seed", config.seed)
    methods = make_methods(config)
    baseline = baseline_of(config, methods)
    benchmark: Prompts = instantiate(config.benchmarks)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    heads = load_heads(config.target.path)
    job = StatesJob(config)
    tokenizer, store = job.tokenizer, job.open_store(heads)
    layer_ids = tuple(sorted({i for method in methods for i in method.layer_ids}))
    drafters = [(method, method.drafter(config, heads).to(device)) for method in methods]
    heads = heads.to(device)
    eos_id = special_ids(tokenizer, config.target.mask_token_id).eos
    out = Path(config.out)

    results = []
    for temperature in config.temperature:
        settings = AnswerSettings(
            temperature=temperature,
            top_p=config.top_p if temperature > 0 else 1.0,
            max_new_tokens=benchmark.max_new_tokens,
            max_length=benchmark.max_length,
            mode=config.mode,
            seed=config.seed if temperature > 0 else 0,
            dtype=config.target.dtype,
        )
        documents = with_supervised_pair(
            job.target_answers(benchmark.fitting(tokenizer, config.mode), store.key.target, settings)
        )
        states = job.states(documents, store, layer_ids)
        row_of = {document.id: row for row, document in enumerate(d for shard in states.shards for d in shard.documents)}
        rows_in_order = np.array([row_of[document.id] for document in documents])  # the store sorts by length
        looped = np.array([ends_in_loop(_last_answer(document), end_token_id=eos_id) for document in documents])
        ended = np.mean([int(document.input_ids[-1]) == eos_id for document in documents])
        print(
            f"T = {temperature}: {len(documents)} answers, {ended:.0%} end by themselves, {looped.mean():.1%} loop", flush=True
        )
        batches = [list(range(i, min(i + 16, len(states)))) for i in range(0, len(states), 16)]
        parts: dict[str, list] = {method.name: [] for method in methods}
        with tqdm(total=len(states) * len(methods), desc=f"replay T={temperature}", unit="doc", mininterval=2) as bar:
            for batch in batches:
                rows = on_tensors(collate([states[i] for i in batch]), lambda tensor: tensor.to(device))
                for method, drafter in drafters:
                    parts[method.name].append(replay(drafter, rows, heads, temperature, top_p=settings.top_p, seed=config.seed))
                    bar.update(len(batch))
        for method in methods:
            rounds = concat_rounds(parts[method.name], [len(batch) for batch in batches])
            counts = document_counts(rounds, len(states))
            results.append(
                Sample(
                    method=method.name,
                    temperature=float(temperature),
                    prompt_ids=tuple(document.id for document in documents),
                    groups=tuple(document.domain for document in documents),
                    counts=PromptCounts(**{name: sums[rows_in_order] for name, sums in counts._asdict().items()}),
                    looped=looped,
                    run=method.run_id,
                )
            )
    found = replay_results(results, baseline=baseline, num_resamples=config.num_resamples, seed=config.seed)
    metrics = {
        **jsonable(found.to_json()),
        "target": {"path": str(config.target.path), "fingerprint": store.key.target},
        "environment": environment_record(command_of("src.evaluate")),
        "runs": {method.name: method.run_id for method in methods},
    }
    write_json(out / "metrics.json", metrics)
    (out / "acceptance.md").write_text(markdown(acceptance_blocks(found)))
    (out / "acceptance.csv").write_text(found.results.csv_text())
    results_figure(found.results, out / "acceptance.png", f"Per-position acceptance, target {store.key.target}")
    console = Console()
    Console(width=max(console.width, 130)).print(terminal_table(main_table(found)))
    print(f"wrote {out}/metrics.json, acceptance.md, acceptance.csv, acceptance.png")
    return metrics


def device_of(name: str) -> torch.device:
    """The device that ``auto`` (CUDA if there is one), ``cpu`` or ``cuda`` names; ValueError for another name or no CUDA."""
    one_of("device", name, ("auto", "cpu", "cuda"))
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("device=cuda, and torch finds no CUDA device here: run with device=cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _last_answer(document: Document) -> list[int]:
    """Returns the trailing run of supervised tokens."""
    mask = document.loss_mask.tolist()
    start = len(mask)
    while start and mask[start - 1]:
        start -= 1
    return document.input_ids[start:].tolist()
