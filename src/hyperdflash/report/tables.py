"""A Summary as a terminal table, Markdown, CSV and JSON.

tau first, as in the paper's tables: a column a domain, then the plain mean over domains. Best of a column and
temperature in bold; an interval stands beside every number that is compared.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict

from rich import box
from rich.markup import escape
from rich.table import Table

from hyperdflash.report.bootstrap import LEVEL, MEAN, Estimate
from hyperdflash.report.summary import GroupSummary, Summary

CSV_HEADER = ("temperature", "method", "run_id", "group", "metric", "slot", "value", "low", "high")


def terminal_table(summary: Summary) -> Table:
    """The main table, a section a temperature; about 110 columns wide with six methods' names of usual length."""
    table = Table(box=box.SIMPLE_HEAD, title="Accepted length τ (tokens a round, bonus token included)")
    table.title_justify = table.caption_justify = "left"
    table.add_column("Method")
    for group in summary.groups[:-1]:
        table.add_column(group, justify="right")
    for name in (f"mean [{LEVEL:.0%}]", f"minus {summary.baseline} [{LEVEL:.0%}]", "accepted", "loops", "τ, no loops"):
        table.add_column(name, justify="right")
    for temperature in summary.temperatures:
        best = _best(summary, temperature)
        table.add_row(f"[dim]temperature {temperature:g}[/]")
        for method in summary.at(temperature):
            mean = method.groups[MEAN]
            cells = [estimate_text(g.tau) if name == MEAN else number_text(g.tau.value) for name, g in method.groups.items()]
            cells = [
                f"[bold green]{cell}[/]" if method.name == best[name] else cell
                for name, cell in zip(method.groups, cells, strict=True)
            ]
            difference = summary.difference(method.name, temperature)
            table.add_row(
                escape(method.name),
                *cells,
                estimate_text(difference.tau[MEAN], signed=True) if difference else "",
                number_text(mean.accepted.value),
                f"{mean.looping_share:.1%}",
                number_text(mean.tau_without_loops.value),
            )
        table.add_section()
    first = summary.at(summary.temperatures[0])[0]
    prompts = ", ".join(f"{first.groups[g].prompts} {g}" for g in summary.groups[:-1])
    table.caption = f"{prompts} prompts; mean: plain mean over domains; brackets: {LEVEL:.0%} bootstrap over prompts"
    return table


def markdown_report(summary: Summary) -> str:
    """All tables with the definitions they need, as one Markdown text."""
    parts = []
    for temperature in summary.temperatures:
        parts += [f"### Temperature {temperature:g}", "", *_tau_rows(summary, temperature), ""]
        parts += [f"Difference in tau to {summary.baseline}, paired by prompt:", ""]
        parts += [*_difference_rows(summary, temperature), ""]
        parts += ["Acceptance per drafted position, plain mean over domains, %:", ""]
        parts += [*_position_rows(summary, temperature), ""]
    parts += [_notes(summary), ""]
    return "\n".join(parts)


def csv_text(summary: Summary) -> str:
    """One number a row (tidy form), undefined ones empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for method in summary.methods:
        for name, group in method.groups.items():
            key = (f"{method.temperature:g}", method.name, method.run_id, name)
            for metric, slot, value in _flat(group):
                writer.writerow((*key, metric, slot, *value))
    for difference in summary.differences:
        for name, estimate in difference.tau.items():
            key = (f"{difference.temperature:g}", difference.name, "", name)
            writer.writerow((*key, f"tau minus {difference.baseline}", "", *_triple(estimate)))
    return out.getvalue()


def metrics_dict(summary: Summary) -> dict:
    """What ``metrics.json`` holds: plain dicts, lists, numbers; None where a number is undefined (JSON has no NaN)."""
    return jsonable(
        {
            "baseline": summary.baseline,
            "domains": list(summary.groups[:-1]),
            "interval": {"level": LEVEL, "resamples": summary.num_resamples, "seed": summary.seed, "unit": "prompt"},
            "methods": [asdict(m) for m in summary.methods],
            "differences": [asdict(d) for d in summary.differences],
        }
    )


def _best(summary: Summary, temperature: float) -> dict[str, str]:
    """Group -> name of the method with the highest tau."""
    best = {}
    for group in summary.groups:
        defined = [m for m in summary.at(temperature) if not math.isnan(m.groups[group].tau.value)]
        best[group] = max(defined, key=lambda m: m.groups[group].tau.value).name if defined else ""
    return best


def _tau_rows(summary: Summary, temperature: float) -> list[str]:
    best = _best(summary, temperature)
    header = [
        "Method",
        *(f"{g} τ" for g in summary.groups),
        "accepted",
        "loops",
        "τ without loops",
        "prompts",
        "rounds",
    ]
    rows = []
    for method in summary.at(temperature):
        cells = []
        for name, group in method.groups.items():
            value, bounds = estimate_text(group.tau).split(" ", 1)
            cells.append(f"**{value}** {bounds}" if method.name == best[name] else f"{value} {bounds}")
        mean = method.groups[MEAN]
        rows.append(
            [
                method.name,
                *cells,
                number_text(mean.accepted.value),
                f"{mean.looping_share:.1%}",
                number_text(mean.tau_without_loops.value),
                str(mean.prompts),
                str(mean.rounds),
            ]
        )
    return markdown_table(header, rows)


def _difference_rows(summary: Summary, temperature: float) -> list[str]:
    rows = [
        [d.name, *(estimate_text(d.tau[g], signed=True) for g in summary.groups)]
        for d in summary.differences
        if d.temperature == temperature
    ]
    return markdown_table(["Method", *summary.groups], rows) if rows else ["(no other method)"]


def _position_rows(summary: Summary, temperature: float) -> list[str]:
    methods = summary.at(temperature)
    slots = max(m.num_slots for m in methods)

    def cells(values: tuple[Estimate, ...]) -> list[str]:
        return [number_text(100 * v.value, 1) for v in values] + [""] * (slots - len(values))

    rows: list[list[str]] = []
    for method in methods:
        mean = method.groups[MEAN]
        rows.append([method.name, "survival", *cells(mean.survival)])
        rows.append(["", "conditional", *cells(mean.conditional)])
    return markdown_table(["Method", "", *map(str, range(1, slots + 1))], rows)


def _notes(summary: Summary) -> str:
    runs = dict.fromkeys(m.run_id for m in summary.methods if m.run_id)
    made_by = f" Runs: {', '.join(runs)}." if runs else ""
    return (
        "τ: tokens emitted after the prefill's token / verification rounds (bonus token included, last round clipped); "
        "accepted: draft tokens kept a round. Pooled over rounds within a domain; mean: plain mean over domains. "
        "Survival: share of all rounds that accepted at least k drafts; conditional: share that accepted slot k among "
        "rounds that accepted the earlier ones and had a slot k. "
        f"Brackets: {LEVEL:.0%} percentile bootstrap over prompts, {summary.num_resamples} resamples, seed "
        f"{summary.seed}; they cover the choice of prompts, not the training seed nor the target.{made_by}"
    )


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table: first column to the left, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def estimate_text(estimate: Estimate, signed: bool = False) -> str:
    """``2.29 [2.20, 2.38]``"""
    low, high = (number_text(v, signed=signed) for v in (estimate.low, estimate.high))
    return f"{number_text(estimate.value, signed=signed)} [{low}, {high}]"


def number_text(value: float, digits: int = 2, signed: bool = False) -> str:
    """``2.29``; ``n/a`` for NaN."""
    if math.isnan(value):
        return "n/a"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"  # no "-0.00"


def _flat(group: GroupSummary):
    """(metric, slot or '', (value, low, high))."""
    for metric in ("prompts", "rounds", "looping_share"):
        yield metric, "", (getattr(group, metric), "", "")
    for metric in ("tau", "accepted", "tau_without_loops"):
        yield metric, "", _triple(getattr(group, metric))
    for metric in ("survival", "conditional"):
        for slot, estimate in enumerate(getattr(group, metric), start=1):
            yield metric, slot, _triple(estimate)


def _triple(estimate: Estimate) -> tuple:
    values = (estimate.value, estimate.low, estimate.high)
    return tuple("" if math.isnan(v) else f"{v:.6f}" for v in values)


def jsonable(value):
    """Nested dicts, lists and tuples with None for NaN, which JSON has not."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
