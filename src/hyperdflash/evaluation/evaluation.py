"""Measures methods by replay: the target's answers, their states, every method's rounds on the same texts.

1. methods      native MTP with n steps, or finished runs by the index
2. prompts      held-out prompts with the target's answers at each temperature, from disk or made once
3. states       with every layer that any method reads
4. replay       one pass per method and batch -> rounds -> counts per prompt
5. report       metrics.json, acceptance.md, acceptance.csv, acceptance.png, the tables on the terminal
"""

from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from hyperdflash.answers.exchange import AnswerSettings
from hyperdflash.cli import command_of
from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import special_ids
from hyperdflash.decoding.metrics import document_counts, ends_in_loop
from hyperdflash.decoding.replay import replay
from hyperdflash.evaluation.methods import baseline_of, data_note, make_methods
from hyperdflash.options import instantiate
from hyperdflash.preparing.dataset import with_supervised_pair
from hyperdflash.preparing.job import StatesJob
from hyperdflash.record import environment_record
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.evaluation_tables import acceptance_blocks
from hyperdflash.report.figures import results_figure
from hyperdflash.report.measure import Sample, measure
from hyperdflash.report.results import write_report
from hyperdflash.report.tables import jsonable, markdown, show
from hyperdflash.settings import natural_int, one_of, positive_int
from hyperdflash.states.store import collate
from hyperdflash.targets.load import load_heads
from hyperdflash.training.datamodule import on_tensors

BATCH = 16


def evaluate_by_replay(config: DictConfig) -> dict:
    """Replays all methods; returns the content of metrics.json."""
    if OmegaConf.is_list(config.mode):
        raise ValueError(f"replay takes one mode, got mode={list(config.mode)}: mode=non_think does, by=decoding takes several")
    natural_int("seed", config.seed)
    methods = make_methods(config)
    baseline = baseline_of(config, methods)
    benchmark: Prompts = instantiate(config.benchmarks)
    if config.threads:
        torch.set_num_threads(positive_int("threads", config.threads))
    device = device_of(config.device)
    heads = load_heads(config.target.path)
    job = StatesJob(config)
    tokenizer, store = job.tokenizer, job.open_store(heads)
    layer_ids = tuple(sorted({i for method in methods for i in method.layer_ids}))
    drafters = {method.name: method.drafter(config, heads).to(device) for method in methods}
    heads = heads.to(device)
    eos_id = special_ids(tokenizer, config.target.mask_token_id).eos
    runs = {method.name: method.run_id for method in methods}

    samples = []
    for temperature in config.temperature:
        sampled = {"top_p": config.top_p, "seed": config.seed} if temperature else {"top_p": 1.0, "seed": 0}
        limits = {"max_new_tokens": benchmark.max_new_tokens, "max_length": benchmark.max_length}
        settings = AnswerSettings(temperature=temperature, mode=config.mode, dtype=config.target.dtype, **limits, **sampled)
        prompts = benchmark.fitting(tokenizer, config.mode, heads.config.max_position_embeddings)
        documents = with_supervised_pair(job.target_answers(prompts, store.key.target, settings))
        states = job.states(documents, store, layer_ids)
        ids, domains = tuple(document.id for document in documents), tuple(document.domain for document in documents)
        answers = [d.input_ids[len(d.loss_mask) - int(d.loss_mask.flip(0).int().cumprod(0).sum()) :] for d in documents]
        looped = np.array([ends_in_loop(answer.tolist(), end_token_id=eos_id) for answer in answers])
        ended = np.mean([int(document.input_ids[-1]) == eos_id for document in documents])
        print(f"T = {temperature}: {len(documents)} answers, {ended:.0%} end themselves, {looped.mean():.1%} loop", flush=True)
        row_of = {document.id: row for row, document in enumerate(d for shard in states.shards for d in shard.documents)}
        in_order = np.array([row_of[document.id] for document in documents])  # the store sorts by length
        batches = [range(i, min(i + BATCH, len(states))) for i in range(0, len(states), BATCH)]
        parts: dict[str, list] = {name: [] for name in drafters}
        with tqdm(total=len(states) * len(drafters), desc=f"replay T={temperature}", unit="doc") as bar:
            for batch in batches:
                rows = on_tensors(collate([states[i] for i in batch]), lambda tensor: tensor.to(device))
                for name, drafter in drafters.items():
                    rounds = replay(drafter, rows, heads, temperature, top_p=settings.top_p, seed=config.seed)
                    parts[name].append(vars(document_counts(rounds, len(batch))).values())
                    bar.update(len(batch))
        for name, own in parts.items():
            counts = PromptCounts(*(np.concatenate(sums)[in_order] for sums in zip(*own, strict=True)))
            samples.append(Sample(name, float(temperature), ids, domains, counts, looped, runs[name]))
    found = measure(samples, baseline, (), config.num_resamples, config.seed)
    metrics = {"baseline": baseline, "domains": list(found.groups[:-1]), **found.to_json(), "runs": runs}
    metrics["target"] = {"path": str(config.target.path), "fingerprint": store.key.target}
    metrics["environment"] = environment_record(command_of("src.evaluate"))
    metrics["data"] = {method.name: method.data for method in methods}
    text = markdown([*acceptance_blocks(found, baseline), *filter(None, [data_note(methods)])])
    contents = {"metrics.json": metrics, "acceptance.md": text, "acceptance.csv": found.csv_text()}
    write_report(config.out, contents)
    results_figure(found, Path(config.out) / "acceptance.png", f"Per-position acceptance, target {store.key.target}")
    show(text)
    print(f"wrote {config.out}/{', '.join(contents)}, acceptance.png")
    return jsonable(metrics)


def device_of(name: str) -> torch.device:
    """The device that ``auto`` (CUDA if there is one), ``cpu`` or ``cuda`` names; ValueError for another name or no CUDA."""
    one_of("device", name, ("auto", "cpu", "cuda"))
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("device=cuda, and torch finds no CUDA device here: run with device=cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")
