"""Renders a SweepReport: verdicts, then tables of tau, differences and positions per target."""

import math
from collections.abc import Sequence

from hyperdflash.report.bootstrap import LEVEL, MEAN, Estimate
from hyperdflash.report.results import MINUS_BASELINE
from hyperdflash.report.sweep import Cell, SweepReport, verdict_lines
from hyperdflash.report.tables import Block, Table, estimate_text, number_text, rates_table


def sweep_blocks(report: SweepReport) -> list[Block]:
    """Returns the content of sweep.md and of the page."""
    lines = [f"- {line}" for line in verdict_lines(report)] or ["- nothing to compare: one choice only"]
    compared = sum(bool(cell.shared) for cell in report.cells)
    blocks: list[Block] = [f"# Sweep {report.name}", "## Verdicts", "\n".join(lines)]
    blocks.append(f"{compared} comparisons, no correction for their number.")
    for target in report.prompts:
        cells = [cell for cell in report.cells if cell.target == target]
        blocks += [f"## Target {target}", f"tau, mean over seeds [{LEVEL:.0%} over seeds]; domains, then their plain mean:"]
        blocks += [_taus(cells, report), f"Difference in tau to {report.baseline}, paired by seed and prompt:"]
        blocks += [_differences(cells, report)]
        blocks.append("Acceptance per drafted position, plain mean over domains, %:")
        blocks.append(rates_table({cell.label: cell.rates() for cell in cells}))
    lists = {
        "Marked runs": [f"- {cell.label} on {cell.target}: {mark}" for cell in report.cells for mark in cell.marks],
        "Left out": [f"- {run}: {why}" for run, why in report.left_out.items()],
        "Not finished, or not found": [f"- {label}" for label in report.missing],
        "Runs": [f"- {c.label} on {c.target}: {', '.join(r.directory.name for r in c.seeds.values())}" for c in report.cells],
    }
    for title, entries in lists.items():
        blocks += [f"## {title}", "\n".join(entries)] if entries else []
    prompts = ", ".join(f"{count} on {target}" for target, count in report.prompts.items())
    notes = (
        "tau: tokens per verification round, bonus token included, by replay at temperature 0 of each run's best checkpoint on "
        f"its validation prompts ({prompts}). Pooled over rounds within a domain; {MEAN}: plain mean over domains. Over seeds: "
        f"Student's t at {LEVEL:.0%}. Over prompts: percentile bootstrap, {report.results.interval['resamples']} resamples, "
        "every run of a target on the same ones. Ahead or behind is said only where both intervals of the paired difference "
        "leave out 0, so one seed gives no verdict: the prompts' interval says nothing of other seeds. The best checkpoint "
        "was chosen on these same prompts."
    )
    return [*blocks, notes]


def _taus(cells: Sequence[Cell], report: SweepReport) -> Table:
    rows = []
    for cell in cells:
        taus = [_seeds_text(cell.get("tau", group, over="seeds")) for group in report.results.groups]
        marked = f"{len(cell.marks)} marked" if cell.marks else ""
        sizes = [f"{cell.facts[name]:,}" for name in ("steps", "parameters")]
        rows.append([*_names(cell), *taus, str(len(cell.seeds)), *sizes, marked])
    return Table([*(report.axes or ["runs"]), *report.results.groups, "seeds", "steps", "parameters", "marks"], rows)


def _differences(cells: Sequence[Cell], report: SweepReport) -> Table:
    rows = []
    for cell in cells:
        if cell.shared:
            own = [estimate_text(cell.get(MINUS_BASELINE, g, over="prompts"), signed=True) for g in report.results.groups]
            own += [_seeds_text(cell.get(MINUS_BASELINE, over="seeds"), signed=True), str(len(cell.shared))]
        else:
            own = [""] * (len(report.results.groups) + 2)
        verdict = cell.verdict if cell.shared else "(baseline)" if cell.is_baseline else "(no common seed)"
        rows.append([*_names(cell), verdict, *own])
    over = [f"{group}, over prompts" for group in report.results.groups]
    return Table([*(report.axes or ["runs"]), "verdict", *over, f"{MEAN}, over seeds", "seeds in both"], rows)


def _names(cell: Cell) -> list[str]:
    return list(cell.choices.values()) or [cell.label]


def _seeds_text(estimate: Estimate, signed: bool = False) -> str:
    """Writes an estimate over seeds, without an interval where there is one seed."""
    return number_text(estimate.value, signed=signed) if math.isnan(estimate.low) else estimate_text(estimate, signed=signed)
