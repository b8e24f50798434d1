"""Measures a target's model card: its description, its abilities, and the thresholds that it reaches.

1. text         held-out documents -> nats of the target and a 5-gram, bytes of xz; path statistics of the same forwards
2. answers      greedy, to the committed prompts (stored on disk, shared with src.evaluate where the limits agree)
3. MTP          states of the answers (cached) -> replay of the native block
4. card         model_card.json, and model_card.md rendered from it
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.responses import AnswerSettings
from hyperdflash.cli import command_of
from hyperdflash.contracts import DOMAINS, Conversation, Document
from hyperdflash.data.chat import answer_text, encode
from hyperdflash.data.prompts import HeldoutPrompts, reference_answers
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.metrics import AcceptanceMetrics
from hyperdflash.decoding.repetition import ends_in_loop
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.identity import runs_dir
from hyperdflash.preparing.documents import with_supervised_pair
from hyperdflash.preparing.job import StatesJob
from hyperdflash.record import environment_record, write_json
from hyperdflash.settings import natural_int, positive_int
from hyperdflash.states.store import collate
from hyperdflash.targets.deepseek_v4.build import count_parameters
from hyperdflash.targets.load import Target, load_mtp, read_config
from hyperdflash.targets.producer import InProcess
from tiny_target.card.answers import Answer, answer_figures
from tiny_target.card.paths import PathStatistics
from tiny_target.card.rendering import markdown, threshold_rows, thresholds
from tiny_target.card.text import (
    GROUPS,
    KneserNey,
    bits_per_byte,
    check_order,
    group_of,
    heldout_groups,
    nats_sum,
    state_batches,
    xz_bytes,
)
from tiny_target.corpus.embedded import load_embedded, text_bytes

SETTINGS = ("mode", "text_bytes", "prime_bytes", "ngram_order", "mtp_steps", "samples", "batch_tokens", "threads")


def make_card(config: DictConfig) -> dict:
    """Measures everything and writes the card; returns the content of model_card.json."""
    for name in ("text_bytes", "prime_bytes", "mtp_steps", "batch_tokens", "threads"):
        positive_int(name, config[name])
    natural_int("samples", config.samples)
    check_order(config.ngram_order)
    benchmark: HeldoutPrompts = instantiate(config.benchmarks)
    prompts = benchmark.conversations()
    read_config(config.target.path)
    tokenizer = load_tokenizer(config.target.path)
    torch.set_num_threads(config.threads)
    seconds: dict[str, float] = {}

    with _timed(seconds, "loading"):
        target: Target = instantiate(config.target)
        train = load_embedded("train")
        groups = heldout_groups(load_embedded("heldout"), config.text_bytes)
    text, paths, ngram_train_tokens = _measure_text(config, target, tokenizer, train, groups, seconds)
    with _timed(seconds, "answers"):
        settings = AnswerSettings(max_new_tokens=benchmark.max_new_tokens, max_length=benchmark.max_length, mode=config.mode)
        documents = StatesJob(config).target_answers(prompts, target.fingerprint, settings, lambda: target)
    answers = _answers(prompts, documents, tokenizer, config.target.mask_token_id)
    looping = {answer.id for found in answers.values() for answer in found if answer.looped}
    with _timed(seconds, "MTP replay"):
        mtp = _measure_mtp(config, target, with_supervised_pair(documents), looping)

    command = command_of("src.card")
    environment = environment_record(command)
    diff = environment.pop("git_diff")
    card = {
        "made_by": {**environment, "git_dirty": bool(diff)},
        "settings": {**{name: config[name] for name in SETTINGS}, **dict(config.benchmarks)},
        "target": _description(target, len(tokenizer)),
        "training": training_record(runs_dir() / "pretrain" / target.path.name / "log.jsonl"),
        "ngram_train_tokens": ngram_train_tokens,
        "text": text,
        "answers": {name: answer_figures(found) for name, found in answers.items()},
        "mtp": mtp,
        "paths": paths,
        "samples": {
            name: [{"question": a.question, "text": a.text, "ended": a.ended} for a in found[: config.samples]]
            for name, found in answers.items()
        },
        "seconds": seconds,
    }
    card["thresholds"] = [
        {"name": t.name, "relation": t.relation, "asked": t.asked, "measured": t.measured, "met": t.met}
        for t in thresholds(card)
    ]
    out = Path(config.out) if config.out else runs_dir() / "card" / target.path.name
    write_json(out / "model_card.json", card)
    (out / "model_card.md").write_text(markdown(card), encoding="utf-8")
    _print_thresholds(card)
    print(f"wrote {out}/model_card.json and {out}/model_card.md in {sum(seconds.values()):.0f} s")
    return card


def training_record(log: Path) -> dict | None:
    """Returns the last record of a pretraining's log.jsonl; None without one."""
    lines = log.read_text().splitlines() if log.exists() else []
    if not lines:
        return None
    last = json.loads(lines[-1])
    return {
        "tokens": last["tokens"],
        "steps": last["step"],
        "minutes": last["elapsed_s"] / 60,
        "loss": last["loss"],
        "mtp_loss": last["mtp_loss"],
    }


def _measure_text(
    config: DictConfig,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Conversation],
    groups: dict[str, list[Conversation]],
    seconds: dict[str, float],
) -> tuple[dict, dict, int]:
    """Returns figures of held-out text by group, path figures by group and "all", and the n-gram's training tokens."""
    documents = {name: [encode(c, tokenizer, config.mode) for c in found] for name, found in groups.items()}
    with _timed(seconds, "5-gram"):
        bar = tqdm(train, desc="encode training text", unit="doc", mininterval=2)
        train_ids = [encode(c, tokenizer, config.mode).input_ids.numpy() for c in bar]
        ngram = KneserNey(train_ids, target.model.config.vocab_size, config.ngram_order)
        ngram_nats = {name: float(ngram.nats([d.input_ids for d in found]).sum()) for name, found in documents.items()}
        train_tokens = sum(map(len, train_ids))
        del ngram, train_ids
    with _timed(seconds, "xz"):
        xz = xz_bytes(train, groups, config.prime_bytes, config.threads)
    text, paths = {}, {}
    with _timed(seconds, "target's text"):
        for name, found in documents.items():
            statistics, nats, tokens = PathStatistics(), 0.0, 0
            for batch in state_batches(target, found, config.batch_tokens, f"held-out text, {name}"):
                more, count = nats_sum(target.heads, batch)
                nats, tokens = nats + more, tokens + count
                statistics.update(target.heads, batch.final[batch.loss_mask])
            size = sum(map(text_bytes, groups[name]))
            paths[name] = statistics
            text[name] = {
                "documents": len(found),
                "bytes": size,
                "tokens": tokens,
                "nats": nats,
                "target": bits_per_byte(nats, size),
                "xz": 8 * xz[name] / size,
                "ngram": bits_per_byte(ngram_nats[name], size),
            }
    figures = {name: statistics.figures() for name, statistics in paths.items()}
    figures["all"] = sum(paths.values(), start=PathStatistics()).figures()
    return text, figures, train_tokens


def _answers(
    prompts: Sequence[Conversation],
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int | None,
) -> dict[str, list[Answer]]:
    """Returns the last answer to each prompt by group."""
    eos_id = special_ids(tokenizer, mask_token_id).eos
    questions = {prompt.id: prompt.turns[-1].content for prompt in prompts}
    wanted = reference_answers()
    answers: dict[str, list[Answer]] = {name: [] for name in GROUPS}
    for document in (d for d in documents if d.id in questions):  # think_high has another one per earlier turn
        others = (~document.loss_mask).nonzero()
        ids = document.input_ids[int(others[-1]) + 1 if len(others) else 0 :].tolist()
        group = group_of(document.id, document.domain)
        answers[group].append(
            Answer(
                id=document.id,
                group=group,
                question=questions[document.id],
                text=answer_text(ids, tokenizer),
                num_tokens=len(ids),
                ended=bool(ids) and ids[-1] == eos_id,
                looped=ends_in_loop(ids, end_token_id=eos_id),
                wanted=wanted.get(document.id),
            )
        )
    return answers


def _measure_mtp(config: DictConfig, target: Target, documents: Sequence[Document], looping: set[str]) -> dict:
    """Measures the acceptance of the native MTP block, chained ``mtp_steps`` times, at T = 0.

    By group, by domain, and by domain without the documents in ``looping``, whose text is easy to draft.
    """
    job = StatesJob(config)
    states = job.states(documents, job.open_store(target.heads), (), lambda: InProcess(target))
    ordered = [document for shard in states.shards for document in shard.documents]
    drafter = MTPChain(load_mtp(config.target.path, experts=config.target.experts), config.mtp_steps).eval()
    without = {domain: f"{domain}, no loops" for domain in DOMAINS}
    metrics = {name: AcceptanceMetrics(config.mtp_steps) for name in (*GROUPS[:2], *DOMAINS, *without.values())}
    pools: dict[tuple[str, ...], list[int]] = {}  # names of the metrics that a document counts in -> documents
    for index, document in enumerate(ordered):
        names = {group_of(document.id, document.domain), document.domain}
        names |= set() if document.id in looping else {without[document.domain]}
        pools.setdefault(tuple(sorted(names)), []).append(index)
    with tqdm(total=len(states), desc="MTP replay", unit="doc", mininterval=2) as bar:
        for names, rows in pools.items():
            for batch in (rows[i : i + 16] for i in range(0, len(rows), 16)):
                rounds = replay(drafter, collate([states[i] for i in batch]), target.heads, temperature=0)
                for name in names:
                    metrics[name].update(rounds)
                bar.update(len(batch))
    return {name: _acceptance(found) for name, found in metrics.items()}


def _acceptance(metrics: AcceptanceMetrics) -> dict:
    if not int(metrics.rounds_count):
        empty = [None] * metrics.num_slots
        return {"tau": None, "accepted": None, "survival": empty, "conditional": empty, "rounds": 0}
    found = metrics.compute()
    return {
        "tau": float(found.tau),
        "accepted": float(found.accepted),
        "survival": found.survival.tolist(),
        "conditional": [None if math.isnan(value) else value for value in found.conditional.tolist()],
        "rounds": int(found.rounds),
    }


def _description(target: Target, tokenizer_size: int) -> dict:
    config = target.model.config
    if tokenizer_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {target.path} has {tokenizer_size} entries and the model {config.vocab_size}: "
            "give the tokenizer it was trained with"
        )
    return {
        "name": target.path.name,
        "path": str(target.path),
        "fingerprint": target.fingerprint,
        "parameters": count_parameters(target.model, target.mtp),
        "mtp_parameters": count_parameters(target.mtp),
        "file_bytes": sum(file.stat().st_size for file in target.path.glob("*.safetensors")),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "paths": config.hc_mult,
        "vocab_size": tokenizer_size,
        "context": config.max_position_embeddings,
    }


def _print_thresholds(card: dict) -> None:
    shown = Table(title=f"Model card of {card['target']['path']}", title_justify="left")
    shown.add_column("threshold")
    for name in ("asked", "measured", "met"):
        shown.add_column(name, justify="right")
    for name, asked, measured, met in threshold_rows(card):
        shown.add_row(name, asked, measured, "[green]yes[/]" if met == "yes" else "[bold red]no[/]")
    Console().print(shown)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
