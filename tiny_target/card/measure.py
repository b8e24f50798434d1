"""Measures a target's model card: its description, its abilities, and the thresholds that it reaches.

1. text         held-out documents -> nats of the target; path statistics of the same forwards
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
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markdown import Markdown
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.exchange import AnswerSettings
from hyperdflash.cli import command_of
from hyperdflash.contracts import DOMAINS, Conversation, Document
from hyperdflash.data.chat import encode
from hyperdflash.data.prompts import HeldoutPrompts, eval_prompts_file
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.metrics import AcceptanceMetrics, ends_in_loop
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.identity import runs_dir
from hyperdflash.options import instantiate
from hyperdflash.preparing.dataset import with_supervised_pair
from hyperdflash.preparing.job import StatesJob
from hyperdflash.record import environment_record, write_json
from hyperdflash.settings import natural_int, positive_int
from hyperdflash.states.store import collate
from hyperdflash.targets.load import Target, load_mtp, read_config
from hyperdflash.targets.producer import InProcess
from tiny_target.build import count_parameters
from tiny_target.card.answers import Answer, answer_figures
from tiny_target.card.paths import path_figures, path_sums
from tiny_target.card.rendering import markdown, thresholds
from tiny_target.card.text import (
    GROUPS,
    bits_per_byte,
    group_of,
    heldout_groups,
    nats_sum,
    residuals,
)
from tiny_target.corpus.embedded import load_embedded, text_bytes

SETTINGS = ("mode", "text_bytes", "mtp_steps", "samples", "batch_tokens", "threads")


def make_card(config: DictConfig) -> dict:
    """Measures everything and writes the card; returns the content of model_card.json."""
    for name in ("text_bytes", "mtp_steps", "batch_tokens", "threads"):
        positive_int(name, config[name])
    natural_int("samples", config.samples)
    benchmark: HeldoutPrompts = instantiate(config.benchmarks)
    prompts = benchmark.conversations()
    read_config(config.target.path)
    tokenizer = load_tokenizer(config.target.path)
    torch.set_num_threads(positive_int("threads", config.threads))
    seconds: dict[str, float] = {}

    with _timed(seconds, "loading"):
        target: Target = instantiate(config.target)
        groups = heldout_groups(load_embedded("heldout"), config.text_bytes)
    with _timed(seconds, "target's text"):
        text, paths = _measure_text(config, target, tokenizer, groups)
    with _timed(seconds, "answers"):
        settings = AnswerSettings(max_new_tokens=benchmark.max_new_tokens, max_length=benchmark.max_length, mode=config.mode)
        documents = StatesJob(config).target_answers(prompts, target.fingerprint, settings, lambda: target)
    answers = _answers(prompts, documents, tokenizer, config.target.mask_token_id)
    looping = {answer.id for found in answers.values() for answer in found if answer.looped}
    with _timed(seconds, "MTP replay"):
        mtp = _measure_mtp(config, target, with_supervised_pair(documents), looping)

    environment = environment_record(command_of("src.card"))
    card = {
        "made_by": {"git_dirty": bool(environment.pop("git_diff")), **environment},
        "settings": {**{name: config[name] for name in SETTINGS}, **dict(config.benchmarks)},
        "target": _description(target, len(tokenizer)),
        "training": training_record(runs_dir() / "pretrain" / target.path.name / "log.jsonl"),
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
    card["thresholds"] = [{**asdict(one), "met": one.met} for one in thresholds(card)]
    out = Path(config.out) if config.out else runs_dir() / "card" / target.path.name
    write_json(out / "model_card.json", card)
    page = markdown(card)
    (out / "model_card.md").write_text(page, encoding="utf-8")
    Console().print(Markdown(page.partition("\n## 2.")[0]))  # the description and the thresholds
    print(f"wrote {out}/model_card.json and {out}/model_card.md in {sum(seconds.values()):.0f} s")
    return card


def training_record(log: Path) -> dict | None:
    """Returns the last record of a pretraining's log.jsonl; None without one."""
    lines = log.read_text().splitlines() if log.exists() else []
    if not lines:
        return None
    last = json.loads(lines[-1])
    more = {name: last[name] for name in ("tokens", "loss", "mtp_loss")}
    return {"steps": last["step"], "minutes": last["elapsed_s"] / 60, **more}


def _measure_text(
    config: DictConfig, target: Target, tokenizer: PreTrainedTokenizerBase, groups: dict[str, list[Conversation]]
) -> tuple[dict, dict]:
    """Returns figures of held-out text by group, and path figures by group and "all"."""
    text, sums = {}, {}
    for name, found in groups.items():
        documents = [encode(c, tokenizer, config.mode) for c in found]
        sums[name], nats, tokens = [], 0.0, 0
        for batch, residual in residuals(target, documents, config.batch_tokens, f"held-out text, {name}"):
            more, count = nats_sum(target.heads, batch, residual)
            nats, tokens = nats + more, tokens + count
            sums[name].append(path_sums(target.heads, residual[torch.cat([d.loss_mask for d in batch])]))
        size = sum(map(text_bytes, found))
        text[name] = {"documents": len(found), "bytes": size, "tokens": tokens, "nats": nats}
        text[name]["target"] = bits_per_byte(nats, size)
    sums["all"] = [part for parts in sums.values() for part in parts]
    return text, {name: path_figures(parts) for name, parts in sums.items()}


def _answers(
    prompts: Sequence[Conversation],
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int | None,
) -> dict[str, list[Answer]]:
    """Returns the last answer to each prompt by group."""
    eos_id = special_ids(tokenizer, mask_token_id).eos
    questions = {prompt.id: prompt.turns[-1].content for prompt in prompts}
    rows = map(json.loads, eval_prompts_file().read_text(encoding="utf-8").splitlines())
    wanted = {row["id"]: row["answer"] for row in rows if "answer" in row}  # the right number of each math prompt
    answers: dict[str, list[Answer]] = {name: [] for name in GROUPS}
    for document in (d for d in documents if d.id in questions):  # think_high has another one per earlier turn
        others = (~document.loss_mask).nonzero()
        ids = document.input_ids[int(others[-1]) + 1 if len(others) else 0 :].tolist()
        answer = Answer(
            id=document.id,
            group=group_of(document.id, document.domain),
            question=questions[document.id],
            text=answer_text(ids, tokenizer),
            num_tokens=len(ids),
            ended=ids[-1:] == [eos_id],
            looped=ends_in_loop(ids, end_token_id=eos_id),
            wanted=wanted.get(document.id),
        )
        answers[answer.group].append(answer)
    return answers


def answer_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decodes generated ids up to the end token, without reasoning and control tokens."""
    special, kept = special_ids(tokenizer, mask_id=0), [int(index) for index in ids]
    if special.eos in kept:
        kept = kept[: kept.index(special.eos)]
    if special.think_end in kept:
        kept = kept[len(kept) - kept[::-1].index(special.think_end) :]
    return tokenizer.decode(kept, skip_special_tokens=True)


def _measure_mtp(config: DictConfig, target: Target, documents: Sequence[Document], looping: set[str]) -> dict:
    """Measures the acceptance of the native MTP block, chained ``mtp_steps`` times, at T = 0.

    By group, by domain, and by domain without the documents in ``looping``, whose text is easy to draft.
    """
    job = StatesJob(config)
    states = job.states(documents, job.open_store(target.heads), (), lambda: InProcess(target))
    drafter = MTPChain(load_mtp(config.target.path, experts=config.target.experts), config.mtp_steps).eval()
    without = {domain: f"{domain}, no loops" for domain in DOMAINS}
    metrics = {name: AcceptanceMetrics(config.mtp_steps) for name in (*GROUPS[:2], *DOMAINS, *without.values())}
    pools: dict[tuple[str, ...], list[int]] = {}  # names of the metrics that a document counts in -> documents
    for index in range(len(states)):
        document = states.document(index)
        names = {group_of(document.id, document.domain), document.domain}
        names |= set() if document.id in looping else {without[document.domain]}
        pools.setdefault(tuple(sorted(names)), []).append(index)
    with tqdm(total=len(states), desc="MTP replay", unit="doc") as bar:
        for names, rows in pools.items():
            for batch in (rows[i : i + 16] for i in range(0, len(rows), 16)):
                rounds = replay(drafter, collate([states[i] for i in batch]), target.heads, temperature=0)
                for name in names:
                    metrics[name].update(rounds)
                bar.update(len(batch))
    return {
        name: {key: _without_nan(value.tolist()) for key, value in found.compute()._asdict().items()}
        for name, found in metrics.items()
    }


def _without_nan(value: float | list) -> float | list | None:
    """Returns a number or a list of numbers with None for NaN, which JSON lacks."""
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if math.isnan(value) else value


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


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
