"""A SweepReport as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math

from hyperdflash.report.bootstrap import LEVEL, MEAN, Estimate
from hyperdflash.report.sweep import Cell, SweepReport, verdict_lines
from hyperdflash.report.tables import estimate_text, markdown_table, number_text

STEPS_SHOWN = 20
CSV_HEADER = ("target", "label", "seeds", "steps", "parameters", "group", "metric", "slot", "value", "low", "high", "interval")


def sweep_markdown(report: SweepReport) -> str:
    """Verdicts, then a table of tau, one of differences and one of positions a target."""
    parts = [f"# Sweep {report.name}", "", "## Verdicts", ""]
    parts += [f"- {line}" for line in verdict_lines(report)] or ["- nothing to compare: one choice only"]
    comparisons = sum(cell.difference is not None for cell in report.cells)
    parts += ["", f"{comparisons} comparisons, no correction for their number.", ""]
    for target in report.targets:
        cells = report.at(target)
        parts += [
            f"## Target {target}",
            "",
            f"tau, mean over seeds [{LEVEL:.0%} over seeds]; domains, then their plain mean:",
            "",
        ]
        parts += [*_tau_rows(cells, report), ""]
        parts += [
            f"Difference in tau to {report.baseline}, paired by seed and prompt:",
            "",
            *_difference_rows(cells, report),
            "",
        ]
        parts += _step_rows(cells, report)
        parts += ["Acceptance per drafted position, plain mean over domains, %:", "", *_position_rows(cells, report), ""]
    marked = [f"- {cell.label} on {cell.target}: {mark}" for cell in report.cells for mark in cell.marks]
    if marked:
        parts += ["## Marked runs", "", *marked, ""]
    if report.left_out:
        parts += ["## Left out", "", *(f"- {run}: {why}" for run, why in report.left_out.items()), ""]
    if report.missing:
        parts += ["## Not finished, or not found", "", *(f"- {label}" for label in report.missing), ""]
    parts += ["## Runs", "", *(f"- {cell.label} on {cell.target}: {', '.join(cell.runs)}" for cell in report.cells), ""]
    return "\n".join([*parts, _notes(report), ""])


def sweep_csv(report: SweepReport) -> str:
    """One number a row (tidy form), undefined ones empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*report.axes, *CSV_HEADER))
    for cell in report.cells:
        key = (
            *cell.choices.values(),
            cell.target,
            cell.label,
            " ".join(map(str, cell.seeds)),
            cell.steps,
            cell.parameters,
        )
        for metric, slot, group, estimate, over in _numbers(cell):
            values = ("" if math.isnan(v) else f"{v:.6f}" for v in (estimate.value, estimate.low, estimate.high))
            writer.writerow((*key, group, metric, slot, *values, over))
    return out.getvalue()


def curves_csv(report: SweepReport) -> str:
    """tau by step: one validation of one cell a row; its difference to the baseline with the interval over seeds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ("target", "label", "seeds", "step", "tau", "lowest_seed", "highest_seed")
    writer.writerow((*report.axes, *header, "minus_baseline", "minus_baseline_low", "minus_baseline_high"))
    for cell in report.cells:
        key = (*cell.choices.values(), cell.target, cell.label, " ".join(map(str, cell.seeds)))
        for step, *values in cell.curve:
            found = cell.curve_difference.get(int(step))
            values = [*values, *((found.value, found.low, found.high) if found else (math.nan,) * 3)]
            writer.writerow((*key, int(step), *("" if math.isnan(v) else f"{v:.6f}" for v in values)))
    return out.getvalue()


def _numbers(cell: Cell):
    """(metric, slot or '', group, Estimate, what its interval is over)."""
    for group, estimate in cell.tau_over_seeds.items():
        yield "tau", "", group, estimate, "seeds"
    for group, estimate in cell.tau_over_prompts.items():
        yield "tau", "", group, estimate, "prompts"
    over = "seeds" if len(cell.seeds) > 1 else "prompts"
    for metric in ("survival", "conditional"):
        for slot, estimate in enumerate(getattr(cell, metric), start=1):
            yield metric, slot, MEAN, estimate, over
    if cell.difference:
        for over, estimates in (("seeds", cell.difference.over_seeds), ("prompts", cell.difference.over_prompts)):
            for group, estimate in estimates.items():
                yield "tau minus baseline", "", group, estimate, over


def _tau_rows(cells: tuple[Cell, ...], report: SweepReport) -> list[str]:
    header = [*(report.axes or ["runs"]), *report.groups, "seeds", "steps", "parameters", "marks"]
    rows = []
    for cell in cells:
        texts = [_seeds_text(cell.tau_over_seeds[group]) for group in report.groups]
        marked = f"{len(cell.marks)} marked" if cell.marks else ""
        names = list(cell.choices.values()) or [cell.label]
        rows.append([*names, *texts, str(len(cell.seeds)), f"{cell.steps:,}", f"{cell.parameters:,}", marked])
    return markdown_table(header, rows)


def _difference_rows(cells: tuple[Cell, ...], report: SweepReport) -> list[str]:
    header = [
        *(report.axes or ["runs"]),
        *(f"{group}, over prompts" for group in report.groups),
        f"{MEAN}, over seeds",
        "seeds in both",
        "verdict",
    ]
    rows = []
    for cell in cells:
        names = list(cell.choices.values()) or [cell.label]
        if cell.difference is None:
            told = "(baseline)" if cell.is_baseline else "(no common seed)"
            rows.append([*names, *[""] * (len(report.groups) + 2), told])
            continue
        own = cell.difference
        prompts = [estimate_text(own.over_prompts[group], signed=True) for group in report.groups]
        seeds = _seeds_text(own.over_seeds[MEAN], signed=True)
        rows.append([*names, *prompts, seeds, str(len(own.seeds)), own.verdict])
    return markdown_table(header, rows)


def _step_rows(cells: tuple[Cell, ...], report: SweepReport) -> list[str]:
    """Steps down, choices across; nothing where no two cells were validated at one step."""
    cells = tuple(cell for cell in cells if cell.curve_difference)
    steps = sorted({step for cell in cells for step in cell.curve_difference})
    if not steps:
        return []
    shown = steps[:: math.ceil(len(steps) / STEPS_SHOWN)]
    shown += [steps[-1]] if shown[-1] != steps[-1] else []
    rows = []
    for step in shown:
        found = [cell.curve_difference.get(step) for cell in cells]
        rows.append([f"{step:,}", *(_seeds_text(e, signed=True) if e else "" for e in found)])
    told = (
        f"Difference in tau to {report.baseline} by step, paired by seed [{LEVEL:.0%} over seeds, each step by itself]; tau as "
        f"logged, pooled over all validation rounds; {len(shown)} of {len(steps)} steps, all in curves.csv:"
    )
    return [told, "", *markdown_table(["step", *(cell.label for cell in cells)], rows), ""]


def _position_rows(cells: tuple[Cell, ...], report: SweepReport) -> list[str]:
    rows = []
    for cell in cells:
        for metric in ("survival", "conditional"):
            values = [number_text(100 * e.value, 1) for e in getattr(cell, metric)]
            rows.append([cell.label if metric == "survival" else "", metric, *values])
    return markdown_table(["", "", *map(str, range(1, report.num_slots + 1))], rows)


def _seeds_text(estimate: Estimate, signed: bool = False) -> str:
    """Without an interval where there is one seed."""
    return number_text(estimate.value, signed=signed) if math.isnan(estimate.low) else estimate_text(estimate, signed=signed)


def _notes(report: SweepReport) -> str:
    prompts = ", ".join(f"{count} on {target}" for target, count in report.prompts.items())
    return (
        "tau: tokens a verification round, bonus token included, by replay at temperature 0 of each run's best checkpoint on "
        f"its validation prompts ({prompts}). Pooled over rounds within a domain; {MEAN}: plain mean over domains. Over seeds: "
        f"Student's t at {LEVEL:.0%}. Over prompts: percentile bootstrap, {report.num_resamples} resamples, every run of a "
        "target on the same ones. Ahead or behind is said only where both intervals of the paired difference leave out 0; with "
        "one seed the prompts' interval alone decides, and other seeds are not covered. The best checkpoint was chosen on "
        "these same prompts."
    )
