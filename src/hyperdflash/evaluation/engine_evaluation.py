"""Measures AR and native MTP in running servers of a serving engine: the same prompts, the same tables.

1. servers      one per method: ``AR``, ``MTP3``, ...; an untimed request to each first
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
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hyperdflash.contracts import ENGINES
from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.engines.serving import Served, ask
from hyperdflash.evaluation.conversations import answer_all, samples_of, write_evaluation, write_tables
from hyperdflash.evaluation.methods import compose_method
from hyperdflash.evaluation.turn_rows import read_rows
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.measure import AUTOREGRESSIVE
from hyperdflash.report.tables import Table, markdown
from hyperdflash.settings import one_of, positive_number
from hyperdflash.targets.load import fingerprint, load_heads

MTP = re.compile(r"MTP *\(?(\d+)\)?")


def evaluate_in_engine(config: DictConfig) -> Path:
    """Asks the servers, then writes the report; returns the folder."""
    engine = one_of("engine.name", config.engine.name, ENGINES)
    servers = servers_of(config.engine)
    rows = list(read_rows(ask_all(config, engine, servers)))
    report(rows, config, engine, servers)
    return Path(config.out)


def servers_of(engine: DictConfig) -> dict[str, str]:
    """Returns base URLs by method as the tables name it, AR first; ValueError for a name that is no method."""
    if OmegaConf.is_missing(engine, "servers") or not OmegaConf.is_dict(engine.servers) or not engine.servers:
        raise ValueError(
            "give a server a method, in quotes for the shell: 'engine.servers={AR:http://host:8000,MTP3:http://host:8001}'"
        )
    found = {}
    for name, url in engine.servers.items():
        steps = MTP.fullmatch(str(name))
        if name != AUTOREGRESSIVE and not steps:
            raise ValueError(
                f"engine.servers names {name!r}, but a stock engine serves AR and the native MTP block only: name the servers "
                "AR, MTP3, MTP6, ... by what each was started with"
            )
        if not str(url).startswith(("http://", "https://")):
            raise ValueError(f"engine.servers.{name} must be a URL such as http://localhost:8000, got {url!r}")
        found[f"MTP ({steps[1]})" if steps else AUTOREGRESSIVE] = str(url).rstrip("/")
    if AUTOREGRESSIVE not in found:
        raise ValueError(f"engine.servers has no AR, which speedups are relative to; it has {', '.join(found)}")
    return {AUTOREGRESSIVE: found.pop(AUTOREGRESSIVE), **found}


def num_slots(method: str) -> int:
    """Returns drafts per round, 0 for AR."""
    return 0 if method == AUTOREGRESSIVE else int(MTP.fullmatch(method)[1])


def ask_all(config: DictConfig, engine: str, servers: dict[str, str]) -> Path:
    """Writes rows.jsonl of every server on every prompt; returns its path."""
    benchmark: Prompts = instantiate(config.benchmarks)
    tokenizer = load_tokenizer(config.target.path)
    stop_ids = (special_ids(tokenizer, config.target.mask_token_id).eos,)
    timeout_s = positive_number("engine.timeout_s", config.engine.timeout_s)

    def request(name: str, prompt_ids: list[int], max_new_tokens: int, temperature: float, top_p: float, seed: int) -> Served:
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        found = ask(engine, servers[name], prompt_ids, timeout_s, stop_ids=stop_ids, **sampling)
        check_method(name, servers[name], found)
        return found

    def warm_up(prompt_ids: list[int]) -> None:
        for name in servers:
            request(name, prompt_ids, 16, 0, 1.0, 0)

    def answer(name: str, prompt_ids: list[int], temperature: float, draws: str) -> dict:
        top_p = config.top_p if temperature else 1.0
        found = request(name, prompt_ids, benchmark.max_new_tokens, temperature, top_p, seed_of(draws))
        return {"prompt_tokens": len(prompt_ids), **asdict(found)}

    identity = {"engine": engine, "target": fingerprint(load_heads(config.target.path)), "methods": list(servers)}
    return answer_all(config, identity, benchmark, tokenizer, list(servers), answer, prepare=warm_up)


def check_method(method: str, server: str, answer: Served) -> None:
    """Raises ValueError where the server runs another method than its name."""
    if method == AUTOREGRESSIVE:
        if answer.rounds:
            raise ValueError(f"{server} was named AR but drafts: start it without speculation, or name it by its method")
    elif answer.after_first and not answer.rounds:
        raise ValueError(f"{server} was named {method} but drafts nothing: start it with its MTP block, or name it AR")
    elif answer.survived and len(answer.survived) != num_slots(method):
        raise ValueError(
            f"{server} was named {method} but drafts {len(answer.survived)} tokens per round: name it by what it runs"
        )


def seed_of(draws: str) -> int:
    """Returns a request's seed, which earlier requests do not change."""
    return int.from_bytes(hashlib.blake2b(draws.encode(), digest_size=8).digest(), "big") >> 33


def report(rows: Sequence[dict], config: DictConfig, engine: str, servers: dict[str, str]) -> None:
    """Writes paper.md and its companions, engine.md and evaluation.json."""
    out, target = Path(config.out), fingerprint(load_heads(config.target.path))
    eos_id = special_ids(load_tokenizer(config.target.path), config.target.mask_token_id).eos

    def count(name: str, prompts: list[list[dict]]) -> tuple[PromptCounts, list[float]]:
        return prompt_counts(prompts, num_slots(name)), [sum(turn["decode_s"] for turn in turns) for turns in prompts]

    samples = samples_of(rows, config.seed, eos_id, dict.fromkeys(servers, f"{engine}'s own"), count)
    title = f"{config.target.path} ({target}) served by {engine}, batch size 1"
    by_slot = all(turn["survived"] is not None for row in rows for turns in row["methods"].values() for turn in turns)
    drafting = [name for name in servers if name != AUTOREGRESSIVE]
    write_tables(samples, config, title, drafting, figures=by_slot)  # a figure needs counts per slot
    unserved = not_served(config)
    (out / "engine.md").write_text(engine_markdown(rows, title, by_slot, unserved))
    write_evaluation(config, target, len(rows), engine=engine, servers=servers, not_served=unserved)
    print((out / "paper.md").read_text() + "\n" + (out / "engine.md").read_text())
    print(f"wrote paper.md, engine.md, evaluation.json and the tables' files in {out}")


def not_served(config: DictConfig) -> list[str]:
    """Returns the configured methods with a drafter of their own, as the tables name them."""
    composed = [compose_method(name, config.training) for name in config.methods]
    trained = [method for method in composed if "native_steps" not in method.method]
    return [f"{method.method.title} ({instantiate(method.drafter).num_slots})" for method in trained]


def prompt_counts(prompts: Sequence[Sequence[dict]], slots: int) -> PromptCounts:
    """Sums the turns of each of N prompts. AR's rounds are its tokens; a round reaches a slot where it accepts the one
    before."""
    emitted, accepted, rounds = np.zeros((3, len(prompts)), dtype=np.int64)
    survived = np.zeros((len(prompts), slots), dtype=np.int64)
    for i, turns in enumerate(prompts):
        for turn in turns:
            emitted[i] += turn["after_first"]
            accepted[i] += turn["accepted"]
            rounds[i] += turn["rounds"] if slots else turn["after_first"]
            if turn["survived"]:
                survived[i] += turn["survived"]
    reached = np.concatenate([rounds[:, None], survived[:, :-1]], axis=1) if slots else survived
    return PromptCounts(emitted, accepted, rounds, survived, reached)


def engine_markdown(rows: Sequence[dict], target: str, by_slot: bool, unserved: Sequence[str]) -> str:
    """Returns throughput, latency and acceptance per method and temperature, and the methods that no stock engine serves."""
    header = ["Method", "T", "answers", "tokens", "tokens/s", "first token ms", "p95", "ms/token", "answer s", "p95", "τ"]
    header += ["accepted", "text as AR's"]
    lines = []
    for temperature in sorted({row["temperature"] for row in rows}):
        part = [row for row in rows if row["temperature"] == temperature]
        for name in part[0]["methods"]:
            turns = [turn for row in part for turn in row["methods"][name]]
            after, seconds = sum(t["after_first"] for t in turns), sum(t["decode_s"] for t in turns)
            rounds, accepted = (sum(t[key] for t in turns) for key in ("rounds", "accepted"))
            first = 1e3 * np.array([t["first_s"] for t in turns])
            whole = np.array([t["first_s"] + t["decode_s"] for t in turns])
            pairs = [zip(row["methods"][name], row["methods"][AUTOREGRESSIVE], strict=False) for row in part]
            same = [turn["ids"] == plain["ids"] for pair in pairs for turn, plain in pair]
            line = [name, f"{temperature:g}", f"{len(turns):,}", f"{sum(len(t['ids']) for t in turns):,}"]
            line += [f"{after / seconds:.1f}" if seconds else "-", f"{np.median(first):.1f}", f"{np.percentile(first, 95):.1f}"]
            line += [f"{1e3 * seconds / after:.2f}" if after else "-"]
            line += [f"{np.median(whole):.2f}", f"{np.percentile(whole, 95):.2f}"]
            line += [f"{after / rounds:.2f}", f"{accepted / rounds:.2f}"] if rounds else ["-", "-"]
            lines.append([*line, f"{sum(same)} of {len(same)}" if temperature == 0 and name != AUTOREGRESSIVE else ""])
    blocks = [
        f"### In the engine: target {target}",
        Table(header, lines),
        "One request at a time. tokens/s and ms/token: decoding, the first chunk left out; first token and answer: seen by the "
        "client, medians and 95th percentiles. τ and accepted: from the server's counters, which count accepted drafts past "
        "the end of a text too. At T = 0 a text may differ from AR's where two logits tie within the engine's rounding.",
    ]
    if not by_slot:
        blocks[-1] += "\nThe server does not say how many drafts each step accepted: no acceptance by position, no Figure 1."
    if unserved:
        blocks.append(
            f"Not measured here: {'; '.join(unserved)}. A stock engine serves plain decoding and the target's own MTP block; "
            "it has no drafter that reads the residual's paths before hc_head, so a HyperDFlash drafter cannot be served yet. "
            "`python -m src.evaluate by=decoding` measures these in this project's own loop."
        )
    return markdown(blocks)
