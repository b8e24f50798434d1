"""What an evaluation by decoding found, from its rows alone: the paper's tables, where time goes, whether it is lossless."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from hyperdflash.cli import command_of
from hyperdflash.decoding.loop import Generation, loop_rounds
from hyperdflash.decoding.metrics import document_counts
from hyperdflash.decoding.repetition import ends_in_loop
from hyperdflash.evaluation.turn_rows import as_generation
from hyperdflash.planning.cost import RoundTimes, write_cost_report
from hyperdflash.record import environment_record, write_json
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.paper_cells import PAPER_COLUMNS, Column, PaperCell
from hyperdflash.report.paper_tables import write_paper_report
from hyperdflash.report.tables import markdown_table

GENERATE = "transformers generate()"


def report(rows: Sequence[dict], config: DictConfig, run_ids: dict[str, str], fingerprint: str, eos_id: int) -> None:
    """paper.md and its companions, cost/, cost_sampled/, lossless.md, evaluation.json; ``run_ids`` of the drafting methods."""
    out, target = Path(config.out), f"{config.target.path} ({fingerprint})"
    cells = paper_cells(rows, config.seed, eos_id, run_ids)
    written = write_paper_report(cells, out, target, columns_of(rows), list(run_ids), config.num_resamples, config.seed)
    greedy = [row for row in rows if row["temperature"] == 0]
    setting = f"Target {target}, batch size 1, {config.benchmarks.max_new_tokens} new tokens at most, {config.threads} threads"
    for part, name in ((greedy, "cost"), ([r for r in rows if r["temperature"] > 0], "cost_sampled")):
        if part:
            times = [round_times(method, generations) for method, generations in generations_of(part).items()]
            written += write_cost_report(times, out / name, setting)
    (out / "lossless.md").write_text(lossless_markdown(greedy))
    write_json(
        out / "evaluation.json",
        {
            "target": {"path": str(config.target.path), "fingerprint": fingerprint},
            "runs": run_ids,
            "prompts": len(rows),
            "environment": environment_record(command_of("src.evaluate")),
        },
    )
    print((out / "paper.md").read_text() + "\n" + (out / "lossless.md").read_text())
    written += [out / "lossless.md", out / "evaluation.json"]
    print(f"wrote {', '.join(str(path.relative_to(out)) for path in written)} in {out}")


def columns_of(rows: Sequence[dict]) -> tuple[Column, ...]:
    """The paper's columns, or one a domain for prompts that are none of the paper's."""
    benchmarks = dict.fromkeys(row["benchmark"] for row in rows)
    if benchmarks.keys() <= {column.name for column in PAPER_COLUMNS}:
        return PAPER_COLUMNS
    return tuple(Column(name, name, "Held-out") for name in benchmarks)


def generations_of(rows: Sequence[dict]) -> dict[str, list[Generation]]:
    """Method -> all its turns."""
    return {name: [as_generation(turn) for row in rows for turn in row["methods"][name]] for name in rows[0]["methods"]}


def round_times(method: str, generations: Sequence[Generation], batch_size: int = 1) -> RoundTimes:
    """Every round of ``generations``, decoded in ``batch_size`` rows in lockstep."""
    rounds = [r for generation in generations for r in generation.rounds]
    draft, verify, rest = (np.array([getattr(r.seconds, part) for r in rounds]) for part in ("draft", "verify", "rest"))
    emitted = np.array([batch_size * len(r.emitted) for r in rounds])
    first = np.array([generation.first.seconds.total for generation in generations])
    return RoundTimes(method, batch_size, draft, verify, rest, emitted, first)


def paper_cells(rows: Sequence[dict], seed: int, eos_id: int, run_ids: dict[str, str]) -> list[PaperCell]:
    """A cell a method, benchmark, mode and temperature; the turns of a prompt are summed."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["temperature"], row["benchmark"]), []).append(row)
    return [
        _paper_cell(name, key, prompts, seed, eos_id, run_ids.get(name, ""))
        for key, prompts in groups.items()
        for name in prompts[0]["methods"]
    ]


def _paper_cell(name: str, key: tuple, prompts: Sequence[dict], seed: int, eos_id: int, run_id: str) -> PaperCell:
    turns = [[as_generation(turn) for turn in row["methods"][name]] for row in prompts]
    generations = [generation for own in turns for generation in own]
    documents = [index for index, own in enumerate(turns) for _ in own]
    num_slots = max((len(r.drafted) for generation in generations for r in generation.rounds), default=0)
    counts = document_counts(loop_rounds(generations, num_slots, documents), len(prompts))
    mode, temperature, benchmark = key
    return PaperCell(
        method=name,
        benchmark=benchmark,
        mode=mode,
        temperature=temperature,
        seed=seed,
        prompt_ids=tuple(row["id"] for row in prompts),
        counts=PromptCounts(**counts._asdict()),
        looped=np.array([any(ends_in_loop(g.token_ids, end_token_id=eos_id) for g in own) for own in turns]),
        seconds=np.array([sum(g.seconds.total for g in own) for own in turns]),
        run_id=run_id,
    )


def lossless_markdown(rows: Sequence[dict]) -> str:
    """T = 0: how many texts of each method are AR's; every other one with its gap; and AR beside transformers' generate()."""
    if not rows:
        return "No prompts at temperature 0.\n"
    lines, differences = [], []
    for name in rows[0]["methods"]:
        turns = [(row, turn) for row in rows for turn in row["methods"][name]]
        other = [(row, turn["differs"]) for row, turn in turns if "differs" in turn]
        ties = sum(found["tie"] for _, found in other)
        tokens = sum(len(turn["ids"]) for _, turn in turns)
        skipped = sum(not turn.get("compared", True) for _, turn in turns)
        counts = (len(turns), tokens, len(turns) - len(other) - skipped, ties, len(other) - ties, skipped)
        lines.append([name, *(f"{n:,}" for n in counts)])
        differences += [
            [
                name,
                row["id"],
                row["mode"],
                str(found["position"]),
                f"{found['gap']:.1e}",
                "tie" if found["tie"] else "**differs**",
            ]
            for row, found in other
        ]
    text = ["### Temperature 0: is the text AR's?", ""]
    text += markdown_table(["Method", "texts", "tokens", "same", "ties within rounding", "differ", "not compared"], lines)
    if any(line[-1] != "0" for line in lines):
        text += ["", "Not compared: turns after the first difference of a conversation, whose history is another one."]
    if differences:
        text += ["", *markdown_table(["Method", "prompt", "mode", "first at", "gap of logits", ""], differences)]
    timed = [row["generate"] for row in rows if "generate" in row]
    if timed:
        ratios = [found["seconds"] / found["own_seconds"] for found in timed]
        same = sum(found["same_text"] for found in timed)
        text += [
            "",
            f"{GENERATE} on {len(timed)} of these prompts takes {np.median(ratios):.2f} times as long as AR (median of pairs; "
            f"{min(ratios):.2f} to {max(ratios):.2f}), prefill included; {same} of {len(timed)} texts are the same.",
        ]
    return "\n".join([*text, ""])
