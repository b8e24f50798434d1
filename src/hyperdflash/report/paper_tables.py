"""A PaperTable as Markdown, CSV and JSON in the paper's layout, with the details the paper leaves out below it.

A gap is "-" in Markdown, empty in CSV and null or absent in JSON; nothing is ever filled in for it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from hyperdflash.report.bootstrap import LEVEL, MEAN, Estimate
from hyperdflash.report.figures import acceptance_figure
from hyperdflash.report.paper import Entry, PaperTable, Section, figure1_summary, paper_table
from hyperdflash.report.paper_cells import MODES, PAPER_COLUMNS, Column, PaperCell
from hyperdflash.report.records import AUTOREGRESSIVE
from hyperdflash.report.tables import estimate_text, jsonable, markdown_table, number_text

AVERAGE = "Average"
GAP = "-"
DETAILS = (
    "speedup",
    "speedup_low",
    "speedup_high",
    "tau",
    "tau_low",
    "tau_high",
    "accepted",
    "tokens_per_second",
    "prompts",
    "rounds",
    "seeds",
    "looping_share",
    "tau_without_loops",
)


def write_paper_report(
    cells: Sequence[PaperCell],
    out: Path | str,
    target: str,
    columns: Sequence[Column] = PAPER_COLUMNS,
    methods: Sequence[str] = (),
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[Path]:
    """Writes paper.md, paper.json and, a mode, table2.csv or table3.csv, its ..._details.csv and its Figure 1.

    ``target`` names the model the cells were measured on: every table and figure says so. ``methods`` are rows that are
    wanted even where nothing was measured. Modes without a cell are left out, and so is a figure without a benchmark that
    every method has; returns the paths written.
    """
    modes = [mode for mode in MODES if any(cell.mode == mode for cell in cells)]
    if not modes:
        raise ValueError("no cells to report; run python -m src.evaluate benchmarks=paper first")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tables = [paper_table(cells, mode, columns, methods, num_resamples, seed) for mode in modes]
    written = [out / "paper.md", out / "paper.json"]
    written[0].write_text("\n".join(paper_markdown(table, target) for table in tables))
    written[1].write_text(_json_text([paper_dict(table, target) for table in tables]))
    for table in tables:
        for suffix, text in (("", table_csv(table)), ("_details", details_csv(table))):
            written.append(out / f"table{table.number}{suffix}.csv")
            written[-1].write_text(text)
        if summary := figure1_summary(table, cells):
            left_out = [column.title for column in table.columns if column.title not in summary.groups]
            without = f", without {', '.join(left_out)}" if left_out else ""
            title = f"Figure 1 ({table.mode_name}), target {target}{without}"
            written.append(acceptance_figure(summary, out / f"figure1_{table.mode}.png", title))
    return written


def paper_markdown(table: PaperTable, target: str) -> str:
    """The table, what it lacks, its details, plain decoding and notes."""
    lines = [f"### Table {table.number}: {table.mode_name} mode, target {target}", "", *_main_rows(table), ""]
    if table.missing:
        lines += ["Missing:", "", *(f"- {gap}" for gap in table.missing), ""]
    for section in table.sections:
        lines += [f"Details, temperature {section.temperature:g}:", "", *_detail_rows(table, section), ""]
    if table.plain:
        lines += ["Plain decoding, tokens/s:", "", *_plain_rows(table), ""]
    return "\n".join([*lines, _notes(table), ""])


def table_csv(table: PaperTable) -> str:
    """The paper's layout: a row a temperature and method, a speedup and tau column a benchmark; gaps empty."""
    header = ["temperature", "method"]
    header += [f"{title} {metric}" for _, title in _columns(table) for metric in ("speedup", "tau")]
    rows = []
    for section in table.sections:
        for method in table.methods:
            cells = []
            for name, _ in _columns(table):
                entry = section.entries[method].get(name)
                cells += [_raw(entry.speedup.value), _raw(entry.summary.tau.value)] if entry else ["", ""]
            rows.append([f"{section.temperature:g}", method, *cells])
    return _csv(header, rows)


def details_csv(table: PaperTable) -> str:
    """A row a temperature, method (plain ones too) and column that was measured."""
    rows = []
    for section in table.sections:
        for method in (*table.plain, *table.methods):
            for name, title in _columns(table):
                entry = section.entries[method].get(name)
                if entry:
                    details = _details(entry)
                    rows.append([f"{section.temperature:g}", method, title, *(_raw(details[key]) for key in DETAILS)])
    return _csv(["temperature", "method", "benchmark", *DETAILS], rows)


def paper_dict(table: PaperTable, target: str) -> dict:
    """Plain JSON values, every number of the table; None where a number is undefined."""
    return jsonable(
        {
            "table": table.number,
            "mode": table.mode,
            "target": target,
            "columns": [asdict(column) for column in table.columns],
            "interval": {"level": LEVEL, "resamples": table.num_resamples, "seed": table.seed, "unit": "prompt"},
            "methods": table.methods,
            "plain": table.plain,
            "runs": table.run_ids,
            "missing": table.missing,
            "sections": [asdict(section) for section in table.sections],
        }
    )


def _columns(table: PaperTable) -> list[tuple[str, str]]:
    """Name and title, Average last."""
    return [(column.name, column.title) for column in table.columns] + [(MEAN, AVERAGE)]


def _main_rows(table: PaperTable) -> list[str]:
    """Three lines of headings as in the paper; Markdown has no merged cells, so a heading stands over its first column."""
    groups = [column.group.upper() for column in table.columns]
    groups = [group if group not in groups[:i] else "" for i, group in enumerate(groups)] + ["AVG."]
    header = ["Method", *(text for group in groups for text in (group, ""))]
    rows = [["", *(text for _, title in _columns(table) for text in (title, ""))]]
    for section in table.sections:
        rows.append([f"*Temperature = {section.temperature:g}*", *["*Speedup*", "*τ*"] * len(groups)])
        best = {
            (name, metric): _best(section, table.methods, name, metric)
            for name, _ in _columns(table)
            for metric in (_speedup, _tau)
        }
        for method in table.methods:
            cells = []
            for name, _ in _columns(table):
                entry = section.entries[method].get(name)
                for metric, unit in ((_speedup, "×"), (_tau, "")):
                    value = metric(entry).value if entry else math.nan
                    text = GAP if math.isnan(value) else f"{number_text(value)}{unit}"
                    cells.append(f"**{text}**" if value == best[name, metric] else text)
            rows.append([method, *cells])
    return markdown_table(header, rows)


def _detail_rows(table: PaperTable, section: Section) -> list[str]:
    header = ["Method", "Benchmark", "τ", "Speedup", "accepted", "tokens/s", "prompts", "rounds", "seeds", "loops"]
    rows = []
    for method in table.methods:
        name_shown = method
        for name, title in _columns(table):
            entry = section.entries[method].get(name)
            if entry:
                rows.append([name_shown, title, *_detail_cells(entry)])
                name_shown = ""
    return markdown_table([*header, "τ without loops"], rows) if rows else ["(nothing was measured with a drafter)"]


def _detail_cells(entry: Entry) -> list[str]:
    summary = entry.summary
    return [
        estimate_text(summary.tau),
        _or_gap(entry.speedup),
        number_text(summary.accepted.value),
        GAP if math.isnan(entry.tokens_per_second) else number_text(entry.tokens_per_second, 1),
        str(summary.prompts),
        str(summary.rounds),
        str(len(entry.seeds)),
        f"{summary.looping_share:.1%}",
        number_text(summary.tau_without_loops.value),
    ]


def _plain_rows(table: PaperTable) -> list[str]:
    """Tokens/s of every plain method, and the speed of each other one relative to AR."""
    rows = []
    for section in table.sections:
        at = f"{section.temperature:g}"
        for method in table.plain:
            entries = section.entries[method]
            speeds = [entries[c.name].tokens_per_second if c.name in entries else math.nan for c in table.columns]
            rows.append([method, at, *(GAP if math.isnan(v) else number_text(v, 1) for v in speeds), GAP])
        for method in table.plain:
            if method != AUTOREGRESSIVE:
                entries = section.entries[method]
                ratios = [_or_gap(entries[n].speedup) if n in entries else GAP for n, _ in _columns(table)]
                rows.append([f"{method} / {AUTOREGRESSIVE}", at, *ratios])
    return markdown_table(["Method", "T", *(title for _, title in _columns(table))], rows)


def _notes(table: PaperTable) -> str:
    runs = dict.fromkeys(run for run in table.run_ids.values() if run)
    made_by = f" Runs: {', '.join(runs)}." if runs else ""
    return (
        "Layout of the paper's table; these are this target's own numbers. Speedup: tokens a second of decoding over AR's, "
        "same prompts, same run, prefill left out. τ: tokens emitted after the prefill's token / verification rounds (bonus "
        "token included, last round clipped); accepted: draft tokens kept a round. Seeds of a prompt are pooled, then rounds "
        "within a benchmark; Average: plain mean of the columns. Bold: best of a column at a temperature, where no method "
        f"lacks it; {GAP}: not measured. Loops: share of answers that end in a loop. Brackets: {LEVEL:.0%} percentile "
        f"bootstrap over prompts, {table.num_resamples} resamples, seed {table.seed}; they cover the choice of prompts, not "
        f"the training seed nor the target.{made_by}"
    )


def _speedup(entry: Entry) -> Estimate:
    return entry.speedup


def _tau(entry: Entry) -> Estimate:
    return entry.summary.tau


def _best(section: Section, methods: Sequence[str], name: str, metric: Callable[[Entry], Estimate]) -> float:
    """Highest value of a column; NaN, so none, where a method that was measured elsewhere in the section lacks it."""
    measured = [entries for method in methods if (entries := section.entries[method])]
    values = [metric(entries[name]).value if name in entries else math.nan for entries in measured]
    return max(values, default=math.nan) if not any(map(math.isnan, values)) else math.nan


def _or_gap(estimate: Estimate) -> str:
    return GAP if math.isnan(estimate.value) else estimate_text(estimate)


def _details(entry: Entry) -> dict[str, object]:
    summary = entry.summary
    return {
        "speedup": entry.speedup.value,
        "speedup_low": entry.speedup.low,
        "speedup_high": entry.speedup.high,
        "tau": summary.tau.value,
        "tau_low": summary.tau.low,
        "tau_high": summary.tau.high,
        "accepted": summary.accepted.value,
        "tokens_per_second": entry.tokens_per_second,
        "prompts": summary.prompts,
        "rounds": summary.rounds,
        "seeds": " ".join(map(str, entry.seeds)),
        "looping_share": summary.looping_share,
        "tau_without_loops": summary.tau_without_loops.value,
    }


def _raw(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return str(value)


def _csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def _json_text(value: object) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
