"""Renders a SweepReport: verdicts, then tables of tau, differences, steps and positions per target."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hyperdflash.report.bootstrap import LEVEL, MEAN, Estimate
from hyperdflash.report.results import MINUS_BASELINE
from hyperdflash.report.sweep import CURVE, Cell, SweepReport, verdict_lines
from hyperdflash.report.tables import Block, Table, estimate_text, number_text

STEPS_SHOWN = 20


def sweep_blocks(report: SweepReport) -> list[Block]:
    """Returns the content of sweep.md and of the page."""
    lines = [f"- {line}" for line in verdict_lines(report)] or ["- nothing to compare: one choice only"]
    compared = sum(bool(cell.shared) for cell in report.cells)
    blocks: list[Block] = [f"# Sweep {report.name}", "## Verdicts", "\n".join(lines)]
    blocks.append(f"{compared} comparisons, no correction for their number.")
    for target in report.targets:
        cells = report.at(target)
        blocks += [f"## Target {target}", f"tau, mean over seeds [{LEVEL:.0%} over seeds]; domains, then their plain mean:"]
        blocks += [_taus(cells, report), f"Difference in tau to {report.baseline}, paired by seed and prompt:"]
        blocks += [_differences(cells, report), *_steps(cells, report)]
        blocks += ["Acceptance per drafted position, plain mean over domains, %:", _positions(cells, report)]
    lists = {
        "Marked runs": [f"- {cell.label} on {cell.target}: {mark}" for cell in report.cells for mark in cell.marks],
        "Left out": [f"- {run}: {why}" for run, why in report.left_out.items()],
        "Not finished, or not found": [f"- {label}" for label in report.missing],
        "Runs": [f"- {cell.label} on {cell.target}: {', '.join(cell.runs)}" for cell in report.cells],
    }
    for title, entries in lists.items():
        blocks += [f"## {title}", "\n".join(entries)] if entries else []
    return [*blocks, _notes(report)]


def _names(cell: Cell) -> list[str]:
    return list(cell.choices.values()) or [cell.label]


def _taus(cells: Sequence[Cell], report: SweepReport) -> Table:
    rows = []
    for cell in cells:
        taus = [_seeds_text(report.get(cell, "tau", group, over="seeds")) for group in report.groups]
        marked = f"{len(cell.marks)} marked" if cell.marks else ""
        rows.append([*_names(cell), *taus, str(len(cell.seeds)), f"{cell.steps:,}", f"{cell.parameters:,}", marked])
    return Table([*(report.axes or ["runs"]), *report.groups, "seeds", "steps", "parameters", "marks"], rows)


def _differences(cells: Sequence[Cell], report: SweepReport) -> Table:
    rows = []
    for cell in cells:
        if not cell.shared:
            status = "(baseline)" if cell.is_baseline else "(no common seed)"
            rows.append([*_names(cell), *[""] * (len(report.groups) + 2), status])
            continue
        prompts = [report.get(cell, MINUS_BASELINE, group, over="prompts") for group in report.groups]
        seeds = _seeds_text(report.get(cell, MINUS_BASELINE, over="seeds"), signed=True)
        texts = [estimate_text(e, signed=True) for e in prompts]
        rows.append([*_names(cell), *texts, seeds, str(len(cell.shared)), report.verdict(cell)])
    over = [f"{group}, over prompts" for group in report.groups]
    return Table([*(report.axes or ["runs"]), *over, f"{MEAN}, over seeds", "seeds in both", "verdict"], rows)


def _steps(cells: Sequence[Cell], report: SweepReport) -> list[Block]:
    """Returns steps down and choices across; nothing where no two cells were validated at one step."""
    curves = {cell.label: {r.slot: r.estimate for r in report.curve(cell, f"{CURVE} minus baseline")} for cell in cells}
    curves = {label: curve for label, curve in curves.items() if curve}
    steps = sorted({step for curve in curves.values() for step in curve})
    if not steps:
        return []
    shown = steps[:: math.ceil(len(steps) / STEPS_SHOWN)]
    shown += [steps[-1]] if shown[-1] != steps[-1] else []
    found = [[curve.get(step) for curve in curves.values()] for step in shown]
    rows = [
        [f"{step:,}", *(_seeds_text(e, signed=True) if e else "" for e in own)] for step, own in zip(shown, found, strict=True)
    ]
    title = (
        f"Difference in tau to {report.baseline} by step, paired by seed [{LEVEL:.0%} over seeds, each step by itself]; tau as "
        f"logged, pooled over all validation rounds; {len(shown)} of {len(steps)} steps, all in sweep.csv:"
    )
    return [title, Table(["step", *curves], rows)]


def _positions(cells: Sequence[Cell], report: SweepReport) -> Table:
    rows = []
    for cell in cells:
        here = report.of_target[cell.target]
        for metric in ("survival", "conditional"):
            values = [number_text(100 * e.value, 1) for e in here.slots(cell.label, metric, cell.over)]
            rows.append([cell.label if metric == "survival" else "", metric, *values])
    return Table(["", "", *map(str, range(1, max(map(len, rows)) - 1))], rows)


def _seeds_text(estimate: Estimate, signed: bool = False) -> str:
    """Writes an estimate over seeds, without an interval where there is one seed."""
    return number_text(estimate.value, signed=signed) if math.isnan(estimate.low) else estimate_text(estimate, signed=signed)


def _notes(report: SweepReport) -> str:
    prompts = ", ".join(f"{count} on {target}" for target, count in report.prompts.items())
    return (
        "tau: tokens per verification round, bonus token included, by replay at temperature 0 of each run's best checkpoint on "
        f"its validation prompts ({prompts}). Pooled over rounds within a domain; {MEAN}: plain mean over domains. Over seeds: "
        f"Student's t at {LEVEL:.0%}. Over prompts: percentile bootstrap, {report.num_resamples} resamples, every run of a "
        "target on the same ones. Ahead or behind is said only where both intervals of the paired difference leave out 0; with "
        "one seed the prompts' interval alone decides, and other seeds are not covered. The best checkpoint was chosen on "
        "these same prompts."
    )
