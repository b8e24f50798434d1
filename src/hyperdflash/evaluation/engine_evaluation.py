"""Measures methods in running servers of a serving engine: the same prompts, the same tables.

1. servers      one per method: ``AR``, ``MTP3``, ``HyperDFlash6``, ...; an untimed request to each first
2. ask          evaluation.conversations, each turn by a request to the method's server, one at a time: batch size 1
3. report       the paper's tables and engine.md: throughput, latency, acceptance by the engine's counters
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from hyperdflash.contracts import ENGINES
from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.engines.serving import Served, ask
from hyperdflash.evaluation.conversations import answer_all, samples_of, write_evaluation
from hyperdflash.files import read_json
from hyperdflash.options import instantiate
from hyperdflash.report.bootstrap import MEAN, PromptCounts
from hyperdflash.report.measure import AUTOREGRESSIVE
from hyperdflash.report.tables import GAP, Table, markdown
from hyperdflash.settings import one_of, positive_number
from hyperdflash.targets.load import fingerprint, load_heads

METHOD = re.compile(r"([A-Za-z][\w .+-]*?) *\(?(\d+)\)?")  # its name, and its drafts per round


def evaluate_in_engine(config: DictConfig) -> Path:
    """Asks the servers, then writes the report; returns the folder."""
    engine = one_of("engine.name", config.engine.name, ENGINES)
    servers = servers_of(config.engine)
    timeout_s = positive_number("engine.timeout_s", config.engine.timeout_s)
    replayed = None if config.engine.replay is None else replayed_rows(config.engine.replay)
    benchmark: Prompts = instantiate(config.benchmarks)
    tokenizer = load_tokenizer(config.target.path)
    eos_id = special_ids(tokenizer, config.target.mask_token_id).eos
    target = fingerprint(load_heads(config.target.path))

    def request(name: str, prompt_ids: list[int], max_new_tokens: int, temperature: float, seed: int) -> Served:
        sampling = {"temperature": temperature, "top_p": config.top_p if temperature else 1.0, "seed": seed}
        limits = {"max_new_tokens": max_new_tokens, "stop_ids": (eos_id,)}
        found = ask(engine, servers[name], prompt_ids, timeout_s, **limits, **sampling)
        check_method(name, servers[name], found)
        return found

    def warm_up(prompt_ids: list[int]) -> None:
        for name in servers:
            request(name, prompt_ids, 16, 0, 0)

    def answer(name: str, prompt_ids: list[int], temperature: float, draws: str) -> dict:
        found = request(name, prompt_ids, benchmark.max_new_tokens, temperature, seed_of(draws))
        return {"prompt_tokens": len(prompt_ids), **asdict(found)}

    def count(name: str, prompts: list[list[dict]]) -> tuple[PromptCounts, list[float]]:
        return prompt_counts(prompts, num_slots(name)), [sum(turn["decode_s"] for turn in turns) for turns in prompts]

    identity = {"engine": engine, "target": target, "methods": list(servers)}
    rows = answer_all(config, identity, benchmark, tokenizer, list(servers), answer, prepare=warm_up)
    title = f"{config.target.path} ({target}) served by {engine}, batch size 1"
    samples = samples_of(rows, eos_id, dict.fromkeys(servers, f"{engine}'s own"), count)
    texts = {"engine.md": markdown([engine_markdown(rows, title), *by_position(rows, replayed)])}
    record = {"target": {"path": str(config.target.path), "fingerprint": target}, "prompts": len(rows)}
    record |= {"engine": engine, "servers": servers}
    write_evaluation(samples, config, title, texts, record)
    return Path(config.out)


def servers_of(engine: DictConfig) -> dict[str, str]:
    """Returns base URLs by method as the tables name it, AR first; ValueError for a name that is no method."""
    if OmegaConf.is_missing(engine, "servers") or not OmegaConf.is_dict(engine.servers) or not engine.servers:
        raise ValueError(
            "give a server a method, in quotes for the shell: 'engine.servers={AR:http://host:8000,MTP3:http://host:8001}'"
        )
    found = {}
    for name, url in engine.servers.items():
        method = METHOD.fullmatch(str(name))
        if name != AUTOREGRESSIVE and not method:
            raise ValueError(
                f"engine.servers names {name!r}: name a server AR, or "
                "by its method and drafts per round, as MTP3 or HyperDFlash6"
            )
        if not str(url).startswith(("http://", "https://")):
            raise ValueError(f"engine.servers.{name} must be a URL such as http://localhost:8000, got {url!r}")
        found[f"{method[1]} ({method[2]})" if method else AUTOREGRESSIVE] = str(url).rstrip("/")
    if AUTOREGRESSIVE not in found:
        raise ValueError(f"engine.servers has no AR, which speedups are relative to; it has {', '.join(found)}")
    return {AUTOREGRESSIVE: found.pop(AUTOREGRESSIVE), **found}


def num_slots(method: str) -> int:
    """Returns drafts per round, 0 for AR."""
    return 0 if method == AUTOREGRESSIVE else int(METHOD.fullmatch(method)[2])


def check_method(method: str, server: str, answer: Served) -> None:
    """Raises ValueError where the server runs another method than its name."""
    wrong = ""
    if method == AUTOREGRESSIVE:
        wrong = "drafts: start it without speculation, or name it by its method" if answer.rounds else ""
    elif answer.after_first and not answer.rounds:
        wrong = "drafts nothing: start it with its drafter or MTP block, or name it AR"
    elif answer.survived and len(answer.survived) != num_slots(method):
        wrong = f"drafts {len(answer.survived)} tokens per round: name it by what it runs"
    if wrong:
        raise ValueError(f"{server} was named {method} but {wrong}")


def seed_of(draws: str) -> int:
    """Returns a request's seed, which earlier requests do not change."""
    return int.from_bytes(hashlib.blake2b(draws.encode(), digest_size=8).digest(), "big") >> 33


def prompt_counts(prompts: Sequence[Sequence[dict]], slots: int) -> PromptCounts:
    """Sums the turns of each of N prompts. AR's rounds are its tokens; a round reaches a slot where it accepts the one
    before."""

    def total(name: str) -> np.ndarray:
        return np.array([sum(turn[name] for turn in turns) for turns in prompts], dtype=np.int64)

    emitted, rounds = total("after_first"), total("rounds" if slots else "after_first")
    survived = [np.sum([turn["survived"] or [0] * slots for turn in turns], axis=0) for turns in prompts]
    survived = np.array(survived, dtype=np.int64).reshape(len(prompts), slots)
    reached = np.concatenate([rounds[:, None], survived], axis=1)[:, :slots]
    return PromptCounts(emitted, total("accepted"), rounds, survived, reached)


def engine_markdown(rows: Sequence[dict], target: str) -> str:
    """Returns throughput, latency and acceptance per method and temperature."""
    header = ["Method", "T", "answers", "tokens", "tokens/s", "first token ms", "p95", "ms/token", "answer s", "p95", "τ"]
    header += ["accepted", "text as AR's"]
    lines = []
    for temperature in sorted({row["temperature"] for row in rows}):
        part = [row["methods"] for row in rows if row["temperature"] == temperature]
        for name in part[0]:
            turns = [turn for methods in part for turn in methods[name]]
            after, seconds, rounds, accepted = (
                sum(turn[key] for turn in turns) for key in ("after_first", "decode_s", "rounds", "accepted")
            )
            first = 1e3 * np.array([t["first_s"] for t in turns])
            whole = np.array([t["first_s"] + t["decode_s"] for t in turns])
            pairs = [pair for methods in part for pair in zip(methods[name], methods[AUTOREGRESSIVE], strict=False)]
            same = sum(turn["ids"] == plain["ids"] for turn, plain in pairs)
            line = [name, f"{temperature:g}", f"{len(turns):,}", f"{sum(len(t['ids']) for t in turns):,}"]
            line += [f"{after / seconds:.1f}" if seconds else GAP, f"{np.median(first):.1f}", f"{np.percentile(first, 95):.1f}"]
            line += [f"{1e3 * seconds / after:.2f}" if after else GAP]
            line += [f"{np.median(whole):.2f}", f"{np.percentile(whole, 95):.2f}"]
            line += [f"{after / rounds:.2f}", f"{accepted / rounds:.2f}"] if rounds else [GAP, GAP]
            lines.append([*line, f"{same} of {len(pairs)}" if temperature == 0 and name != AUTOREGRESSIVE else ""])
    notes = (
        "One request at a time. tokens/s and ms/token: decoding, the first chunk left out; first token and answer: seen by the "
        "client, medians and 95th percentiles. τ and accepted: from the server's counters, which count accepted drafts past "
        "the end of a text too. At T = 0 a text may differ from AR's where two logits tie within the engine's rounding. "
        "docs/serving.md says which engine serves which drafter; `python -m src.evaluate by=decoding` measures any of them."
    )
    return markdown([f"### In the engine: target {target}", Table(header, lines), notes])


def replayed_rows(folder: str) -> list[dict]:
    """Reads the rows of an evaluation by replay; ValueError where there is none."""
    path = Path(folder) / "metrics.json"
    return read_json(path, f"run `python -m src.evaluate by=replay out={folder}` first")["rows"]


def by_position(rows: Sequence[dict], replayed: Sequence[dict] | None) -> list[str | Table]:
    """Returns tau and the share of rounds that accept at least k drafts, by the engine's counters and by ``replayed`` rows
    of the same method, both as means over domains."""
    methods = [name for name in rows[0]["methods"] if name != AUTOREGRESSIVE]
    most, lines = max(map(num_slots, methods), default=0), []
    for temperature in sorted({row["temperature"] for row in rows}):
        for name in methods:
            domains = {row["benchmark"] for row in rows}
            found = []
            for domain in domains:
                part = [r["methods"][name] for r in rows if (r["temperature"], r["benchmark"]) == (temperature, domain)]
                counts = prompt_counts(part, num_slots(name))
                found.append(np.array([counts.emitted.sum(), *counts.survived.sum(axis=0)]) / max(counts.rounds.sum(), 1))
            lines.append([name, f"{temperature:g}", "engine", *(f"{value:.3f}" for value in np.mean(found, axis=0))])
            own = {
                (r["metric"], r["slot"]): r["value"]
                for r in replayed or ()
                if r["method"] in (name, name.rpartition(" (")[0]) and (r["temperature"], r["group"]) == (temperature, MEAN)
            }
            places = [("tau", None), *(("survival", slot) for slot in range(1, num_slots(name) + 1))]
            if own:
                values = [own.get(place) for place in places]
                lines.append([name, f"{temperature:g}", "replay", *(GAP if v is None else f"{v:.3f}" for v in values)])
    if not lines:
        return []
    header = ["Method", "T", "by", "τ", *(f"≥ {k}" for k in range(1, most + 1))]
    return ["### Accepted by drafted position", Table(header, [line + [""] * (len(header) - len(line)) for line in lines])]
