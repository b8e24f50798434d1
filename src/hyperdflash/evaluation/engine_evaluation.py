"""Measure AR and native MTP inside a serving engine: the same prompts through running servers' API, the same tables.

1. servers      one a method, since a server runs one: ``AR``, ``MTP3``, ...; a request to each before anything is timed
2. prompts      the ones that fit, mode by mode and temperature by temperature, one at a time: batch size 1
3. ask          prompt by prompt all servers, another one first each time; every turn on the history its method wrote
4. rows.jsonl   one line a prompt, appended when all servers have answered: a killed evaluation goes on behind it
5. report       the paper's tables and engine.md: throughput, latency, acceptance as the engine counts it
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
from tqdm import tqdm

from hyperdflash.cli import command_of
from hyperdflash.data.chat import encode_rounds, history_after
from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.repetition import ends_in_loop
from hyperdflash.engines.serving import Sampling, Served, ask
from hyperdflash.evaluation.turn_rows import Rows, read_rows
from hyperdflash.record import environment_record, write_json
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.paper_cells import PAPER_COLUMNS, Column, PaperCell
from hyperdflash.report.paper_tables import write_paper_report
from hyperdflash.report.records import AUTOREGRESSIVE
from hyperdflash.report.tables import markdown_table
from hyperdflash.settings import one_of, positive_number
from hyperdflash.targets.engine_settings import ENGINES
from hyperdflash.targets.load import fingerprint, load_heads

MTP = re.compile(r"MTP *\(?(\d+)\)?")


def evaluate_in_engine(config: DictConfig) -> Path:
    """Ask, then report; returns the folder."""
    engine = one_of("engine.name", config.engine.name, ENGINES)
    servers = servers_of(config.engine)
    modes = list(config.mode) if OmegaConf.is_list(config.mode) else [config.mode]
    rows = list(read_rows(ask_all(config, engine, servers, modes)))
    report(rows, config, engine, servers)
    return Path(config.out)


def servers_of(engine: DictConfig) -> dict[str, str]:
    """Method as the tables name it -> base URL, AR first; ValueError for a name that says no method."""
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
    """Drafts a round: 0 for AR."""
    return 0 if method == AUTOREGRESSIVE else int(MTP.fullmatch(method)[1])


def ask_all(config: DictConfig, engine: str, servers: dict[str, str], modes: Sequence[str]) -> Path:
    """Every server on every prompt, mode and temperature; what is already in rows.jsonl is not done again."""
    benchmark: Prompts = instantiate(config.benchmarks)
    tokenizer = load_tokenizer(config.target.path)
    stop_ids = (special_ids(tokenizer, config.target.mask_token_id).eos,)
    timeout_s = positive_number("engine.timeout_s", config.engine.timeout_s)
    path = Path(config.out) / "rows.jsonl"
    todo = [
        (mode, float(temperature), prompt)
        for mode in modes
        for prompts in [benchmark.fitting(tokenizer, mode)]
        for temperature in config.temperature
        for prompt in prompts
    ]

    def warm_up() -> None:
        mode, _, prompt = todo[0]
        short = Sampling(max_new_tokens=16, stop_ids=stop_ids, temperature=0, top_p=1.0, seed=0)
        for method, server in servers.items():
            check_method(method, server, ask(engine, server, encode_rounds(prompt, tokenizer, mode)[0], short, timeout_s))

    fresh = not path.exists()
    if fresh:  # before the file says which methods it holds
        warm_up()
    rows = Rows(
        path,
        {
            "engine": engine,
            "target": fingerprint(load_heads(config.target.path)),
            "benchmarks": OmegaConf.to_container(config.benchmarks, resolve=True),
            "methods": list(servers),
            "top_p": config.top_p,
            "seed": config.seed,
        },
    )
    left = [(m, t, p) for m, t, p in todo if (m, t, p.id) not in rows.done]
    if left and not fresh:
        warm_up()
    with tqdm(total=len(todo), initial=len(todo) - len(left), desc=engine, unit="prompt", mininterval=2) as bar:
        for index, (mode, temperature, prompt) in enumerate(left):
            names = list(servers)
            names = names[index % len(names) :] + names[: index % len(names)]
            turns = {}
            for name in names:
                bar.set_postfix_str(f"{prompt.domain} T={temperature:g} {name}", refresh=False)
                turns[name], before = [], []
                for number, added in enumerate(encode_rounds(prompt, tokenizer, mode)):
                    sampling = Sampling(
                        max_new_tokens=benchmark.max_new_tokens,
                        stop_ids=stop_ids,
                        temperature=temperature,
                        top_p=config.top_p if temperature else 1.0,
                        seed=seed_of(config.seed, mode, temperature, prompt.id, name, number),
                    )
                    answer = ask(engine, servers[name], [*before, *added], sampling, timeout_s)
                    check_method(name, servers[name], answer)
                    turns[name].append({"prompt_tokens": len(before) + len(added), **asdict(answer)})
                    if answer.ended_by == "length":  # cut: nothing can follow
                        break
                    before = history_after([*before, *added], answer.ids, tokenizer, mode)
            row = {"mode": mode, "temperature": temperature, "benchmark": prompt.domain, "id": prompt.id}
            rows.append(row | {"methods": {name: turns[name] for name in servers}})
            bar.update()
    return rows.path


def check_method(method: str, server: str, answer: Served) -> None:
    """ValueError where the server runs another method than it was named for."""
    if method == AUTOREGRESSIVE:
        if answer.rounds:
            raise ValueError(f"{server} was named AR but drafts: start it without speculation, or name it by its method")
    elif answer.after_first and not answer.rounds:
        raise ValueError(f"{server} was named {method} but drafts nothing: start it with its MTP block, or name it AR")
    elif answer.survived and len(answer.survived) != num_slots(method):
        raise ValueError(
            f"{server} was named {method} but drafts {len(answer.survived)} tokens a round: name it by what it runs"
        )


def seed_of(seed: int, *parts: object) -> int:
    """Of a request: what is asked decides it, not what was asked before."""
    digest = hashlib.blake2b(":".join(map(str, (seed, *parts))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33


def report(rows: Sequence[dict], config: DictConfig, engine: str, servers: dict[str, str]) -> None:
    """paper.md and its companions, engine.md, evaluation.json."""
    out, fingerprint_ = Path(config.out), fingerprint(load_heads(config.target.path))
    eos_id = special_ids(load_tokenizer(config.target.path), config.target.mask_token_id).eos
    cells = engine_cells(rows, config.seed, eos_id, engine)
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    known = set(benchmarks) <= {column.name for column in PAPER_COLUMNS}
    columns = PAPER_COLUMNS if known else tuple(Column(name, name, "Held-out") for name in benchmarks)
    target = f"{config.target.path} ({fingerprint_}) served by {engine}, batch size 1"
    drafting = [name for name in servers if name != AUTOREGRESSIVE]
    written = write_paper_report(cells, out, target, columns, drafting, config.num_resamples, config.seed)
    by_slot = all(turn["survived"] is not None for row in rows for turns in row["methods"].values() for turn in turns)
    if not by_slot:  # the figure would show slots that nobody counted
        for path in [path for path in written if path.name.startswith("figure1")]:
            path.unlink()
    (out / "engine.md").write_text(engine_markdown(rows, target, by_slot, not_served(config)))
    write_json(
        out / "evaluation.json",
        {
            "target": {"path": str(config.target.path), "fingerprint": fingerprint_},
            "engine": engine,
            "servers": servers,
            "prompts": len(rows),
            "not_served": not_served(config),
            "environment": environment_record(command_of("src.evaluate")),
        },
    )
    print((out / "paper.md").read_text() + "\n" + (out / "engine.md").read_text())
    print(f"wrote paper.md, engine.md, evaluation.json and the tables' files in {out}")


def not_served(config: DictConfig) -> list[str]:
    """The configured methods with a drafter of their own."""
    return [entry.name for entry in config.methods if "train" in entry]


def engine_cells(rows: Sequence[dict], seed: int, eos_id: int, engine: str) -> list[PaperCell]:
    """A cell a method, benchmark, mode and temperature; the turns of a prompt are summed."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["temperature"], row["benchmark"]), []).append(row)
    return [
        PaperCell(
            method=name,
            benchmark=benchmark,
            mode=mode,
            temperature=temperature,
            seed=seed,
            prompt_ids=tuple(row["id"] for row in prompts),
            counts=prompt_counts([row["methods"][name] for row in prompts], num_slots(name)),
            looped=np.array(
                [any(ends_in_loop(t["ids"], end_token_id=eos_id) for t in row["methods"][name]) for row in prompts]
            ),
            seconds=np.array([sum(turn["decode_s"] for turn in row["methods"][name]) for row in prompts]),
            run_id=f"{engine}'s own",
        )
        for (mode, temperature, benchmark), prompts in groups.items()
        for name in prompts[0]["methods"]
    ]


def prompt_counts(prompts: Sequence[Sequence[dict]], slots: int) -> PromptCounts:
    """Turns of each of N prompts -> sums a prompt. AR's rounds are its tokens; a slot is reached where the one before it was
    accepted."""
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
    """Throughput, latency and acceptance of every method and temperature, and what no stock engine can serve."""
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
            lines.append(
                [
                    name,
                    f"{temperature:g}",
                    f"{len(turns):,}",
                    f"{sum(len(t['ids']) for t in turns):,}",
                    f"{after / seconds:.1f}" if seconds else "-",
                    f"{np.median(first):.1f}",
                    f"{np.percentile(first, 95):.1f}",
                    f"{1e3 * seconds / after:.2f}" if after else "-",
                    f"{np.median(whole):.2f}",
                    f"{np.percentile(whole, 95):.2f}",
                    f"{after / rounds:.2f}" if rounds else "-",
                    f"{accepted / rounds:.2f}" if rounds else "-",
                    f"{sum(same)} of {len(same)}" if temperature == 0 and name != AUTOREGRESSIVE else "",
                ]
            )
    text = [f"### In the engine: target {target}", "", *markdown_table(header, lines), ""]
    text.append(
        "One request at a time. tokens/s and ms/token: decoding, the first chunk left out; first token and answer: seen by the "
        "client, medians and 95th percentiles. τ and accepted: from the server's counters, which count accepted drafts past "
        "the end of a text too. At T = 0 a text may differ from AR's where two logits tie within the engine's rounding."
    )
    if not by_slot:
        text.append("The server does not say how many drafts each step accepted: no acceptance by position, no Figure 1.")
    if unserved:
        text += [
            "",
            f"Not measured here: {'; '.join(unserved)}. A stock engine serves plain decoding and the target's own MTP block; "
            "it has no drafter that reads the residual's paths before hc_head, so a HyperDFlash drafter cannot be served yet. "
            "`python -m src.evaluate by=decoding` measures these in this project's own loop.",
        ]
    return "\n".join([*text, ""])
