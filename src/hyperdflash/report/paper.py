"""Renders the paper's Tables 2 and 3 and Figure 1 from samples of an evaluation by decoding.

Table 2 is Non-thinking, Table 3 Think-high; a section per temperature, a row per method, speedup and tau in a column pair per
benchmark, grouped Math, Code, Chat; Average is the plain mean of the columns. A column without a measurement is a gap, and so
is an Average that lacks a column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hyperdflash.data.benchmark_rows import BENCHMARKS
from hyperdflash.report.bootstrap import LEVEL, MEAN
from hyperdflash.report.figures import results_figure
from hyperdflash.report.measure import AUTOREGRESSIVE, Sample, measure
from hyperdflash.report.results import Results, Row, write_report
from hyperdflash.report.tables import GAP, Block, Table, estimate_text, jsonable, markdown, number_text, or_gap
from hyperdflash.settings import one_of

MODES = {"non_think": (2, "Non-thinking"), "think_high": (3, "Think-high")}  # table number and name in the paper
AVERAGE = "Average"


@dataclass(frozen=True)
class Column:
    """``name`` a sample's benchmark, ``title`` and ``group`` as printed."""

    name: str
    title: str
    group: str


PAPER_COLUMNS = tuple(
    Column(name, "LCB" if name == "livecodebench" else rows.title, rows.group) for name, rows in BENCHMARKS.items()
)


def columns_of(benchmarks: Sequence[str]) -> tuple[Column, ...]:
    """Returns the paper's columns, or one per domain for prompts from elsewhere."""
    if set(benchmarks) <= {column.name for column in PAPER_COLUMNS}:
        return PAPER_COLUMNS
    return tuple(Column(name, name, "Held-out") for name in dict.fromkeys(benchmarks))


@dataclass(frozen=True)
class PaperTable:
    """Table 2 or 3: ``methods`` with a drafter, and ``plain`` ones."""

    mode: str
    results: Results
    columns: tuple[Column, ...]
    methods: tuple[str, ...]
    plain: tuple[str, ...]
    num_resamples: int
    seed: int

    @property
    def number(self) -> int:
        return MODES[self.mode][0]

    @property
    def titles(self) -> dict[str, str]:
        """Printed title per group, Average last."""
        return {column.name: column.title for column in self.columns} | {MEAN: AVERAGE}

    @property
    def missing(self) -> tuple[str, ...]:
        """A sentence per gap."""
        gaps = tuple(gap for t, here in self.sections() for gap in _missing(self, f"T = {t:g}", here))
        return gaps if self.results.rows else (f"{self.mode}: nothing was measured",)

    def sections(self) -> list[tuple[float, Results]]:
        """Returns each temperature with its rows."""
        return [(t, self.results.at(temperature=t)) for t in sorted(self.results.distinct("temperature"))]


def paper_table(
    samples: Sequence[Sample],
    mode: str,
    columns: Sequence[Column] = PAPER_COLUMNS,
    methods: Sequence[str] = (),
    num_resamples: int = 2000,
    seed: int = 0,
) -> PaperTable:
    """Returns the table of ``mode``, with rows for ``methods`` even where nothing was measured."""
    one_of("mode", mode, tuple(MODES))
    samples = [s for s in samples if s.mode == mode]
    names = tuple(column.name for column in columns)
    if strange := [s for s in samples if not set(s.groups) <= set(names)]:
        raise ValueError(f"{strange[0]} fits no column; columns are {', '.join(names)}")
    drafting = tuple(dict.fromkeys([*methods, *(s.method for s in samples if not s.is_plain)]))
    plain = tuple(dict.fromkeys(s.method for s in samples if s.is_plain))
    if mixed := set(drafting) & set(plain):
        raise ValueError(f"{mixed.pop()!r} has samples with draft slots and samples without: give each its own name")
    runs = {m: ", ".join(dict.fromkeys(s.run for s in samples if s.method == m and s.run)) for m in (*plain, *drafting)}
    ordered = sorted(samples, key=lambda s: list(runs).index(s.method))
    rows = measure(ordered, groups=names, num_resamples=num_resamples, seed=seed)
    results = Results(rows, {("", method): {"run": run} for method, run in runs.items()})
    return PaperTable(mode, results, tuple(columns), drafting, plain, num_resamples, seed)


def figure1_results(table: PaperTable, samples: Sequence[Sample]) -> Results | None:
    """Returns rows over the columns that every measured method has, or None; ``samples`` are those of ``table``."""
    measured = [(here, m) for _, here in table.sections() for m in table.methods if here.measured(m)]
    shared = [c for c in table.columns if measured and all(c.name in here.at(method=m).groups for here, m in measured)]
    if not shared:
        return None
    titles = {c.name: c.title for c in shared}
    mine = [s for s in samples if s.mode == table.mode and not s.is_plain]
    kept = [s.of(name) for m in table.methods for s in mine if s.method == m for name in titles if name in s.groups]
    rows = measure(kept, groups=tuple(titles), num_resamples=table.num_resamples, seed=table.seed)
    return Results(tuple(row._replace(group=titles.get(row.group, MEAN)) for row in rows), table.results.details)


def write_paper_report(
    samples: Sequence[Sample],
    out: Path | str,
    target: str,
    columns: Sequence[Column] = PAPER_COLUMNS,
    methods: Sequence[str] = (),
    num_resamples: int = 2000,
    seed: int = 0,
    figures: bool = True,
) -> list[Path]:
    """Writes paper.md, the record as paper.csv and paper.json, and a Figure 1 per mode; returns their paths.

    ``target`` names the model that was measured: every table and figure says so. Modes without a sample are left out, and so
    is a figure without a benchmark that every method has, or without ``figures``.
    """
    modes = [mode for mode in MODES if any(s.mode == mode for s in samples)]
    if not modes:
        raise ValueError("no samples to report; run python -m src.evaluate benchmarks=paper first")
    tables = [paper_table(samples, mode, columns, methods, num_resamples, seed) for mode in modes]
    everything = Results(tuple(row for table in tables for row in table.results.rows), tables[0].results.details)
    contents = {
        "paper.md": "\n".join(markdown(paper_blocks(table, target)) for table in tables),
        "paper.csv": everything.csv_text(),
        "paper.json": [to_json(table, target) for table in tables],
    }
    written = write_report(out, contents)
    for table in tables if figures else ():
        if found := figure1_results(table, samples):
            left_out = [column.title for column in table.columns if column.title not in found.groups]
            without = f", without {', '.join(left_out)}" if left_out else ""
            title = f"Figure 1 ({MODES[table.mode][1]}), target {target}{without}"
            shown = [m for m in table.methods if found.measured(m)]
            written.append(results_figure(found, Path(out) / f"figure1_{table.mode}.png", title, shown))
    return written


def to_json(table: PaperTable, target: str) -> dict:
    """Returns the record and its settings as JSON values; None where a number is undefined."""
    record = {
        "table": table.number,
        "mode": table.mode,
        "target": target,
        "columns": [asdict(column) for column in table.columns],
        "interval": {"level": LEVEL, "resamples": table.num_resamples, "seed": table.seed, "unit": "prompt"},
        "methods": table.methods,
        "plain": table.plain,
        "runs": {method: own["run"] for (_, method), own in table.results.details.items()},
        "missing": table.missing,
        "rows": table.results.to_json(),
    }
    return jsonable(record)


def paper_blocks(table: PaperTable, target: str) -> list[Block]:
    """Returns the table, its gaps, details, plain decoding and notes."""
    blocks: list[Block] = [f"### Table {table.number}: {MODES[table.mode][1]} mode, target {target}", _main(table)]
    if table.missing:
        blocks += ["Missing:", "\n".join(f"- {gap}" for gap in table.missing)]
    for temperature, here in table.sections():
        blocks += [f"Details, temperature {temperature:g}:", _details(table, here)]
    if table.plain:
        blocks += ["Plain decoding, tokens/s:", _plain(table)]
    return [*blocks, _notes(table)]


def _main(table: PaperTable) -> Table:
    """Returns the table with the paper's three lines of headings, each over its first column, as Markdown merges no cells."""
    groups = [column.group.upper() for column in table.columns]
    groups = [group if group not in groups[:i] else "" for i, group in enumerate(groups)] + ["AVG."]
    rows = [["", *(text for title in table.titles.values() for text in (title, ""))]]
    for temperature, here in table.sections():
        rows.append([f"*Temperature = {temperature:g}*", *["*Speedup*", "*τ*"] * len(groups)])
        columns = []
        for group in table.titles:
            for metric, unit in (("speedup", "×"), ("tau", "")):
                values = {m: here.get(m, metric, group).value for m in table.methods}
                compared = [value for m, value in values.items() if here.measured(m)]
                best = max(compared, default=math.nan) if not any(map(math.isnan, compared)) else math.nan
                texts = {m: or_gap(number_text(value)) for m, value in values.items()}
                texts = {m: text if text == GAP else text + unit for m, text in texts.items()}
                columns.append([f"**{text}**" if values[m] == best else text for m, text in texts.items()])
        rows += [list(row) for row in zip(table.methods, *columns, strict=True)]
    return Table(["Method", *(text for group in groups for text in (group, ""))], rows)


def _details(table: PaperTable, here: Results) -> Block:
    header = ["Method", "Benchmark", "τ", "Speedup", "accepted", "tokens/s", "prompts", "rounds", "seeds", "loops"]
    rows = []
    for method in table.methods:
        shown = method
        for group in (g for g in table.titles if g in here.at(method=method).groups):
            of = {row.metric: row.estimate for row in here.rows if (row.method, row.group, row.slot) == (method, group, None)}
            rows.append([shown, table.titles[group], estimate_text(of["tau"]), or_gap(estimate_text(of["speedup"]))])
            rows[-1] += [number_text(of["accepted"].value), or_gap(number_text(of["tokens_per_second"].value, 1))]
            rows[-1] += [f"{of[name].value:.0f}" for name in ("prompts", "rounds", "seeds")]
            rows[-1] += [f"{of['looping_share'].value:.1%}", number_text(of["tau_without_loops"].value)]
            shown = ""
    return Table([*header, "τ without loops"], rows) if rows else "(nothing was measured with a drafter)"


def _plain(table: PaperTable) -> Table:
    """Returns tokens/s of every plain method, and its speed relative to AR."""
    rows = []
    for temperature, here in table.sections():
        at = f"{temperature:g}"
        for method in table.plain:
            rows.append([method, at, *(number_text(here.get(method, "tokens_per_second", g).value, 1) for g in table.titles)])
        for method in (m for m in table.plain if m != AUTOREGRESSIVE):
            ratios = [estimate_text(here.get(method, "speedup", group)) for group in table.titles]
            rows.append([f"{method} / {AUTOREGRESSIVE}", at, *ratios])
    return Table(["Method", "T", *table.titles.values()], [list(map(or_gap, row)) for row in rows])


def _missing(table: PaperTable, at: str, here: Results) -> list[str]:
    """Returns a sentence per method that a section lacks, in whole or in part."""
    gaps = []
    for method in table.methods:
        own: dict[str, Row] = {row.group: row for row in here.rows if (row.method, row.metric) == (method, "speedup")}
        absent = [c.title for c in table.columns if c.name not in own]
        if len(absent) == len(table.columns):
            gaps.append(f"{at}: {method} was not measured")
        elif absent:
            gaps.append(f"{at}: {method} lacks {', '.join(absent)}, so it has no Average")
        unpaired = [c.title for c in table.columns if c.name in own and math.isnan(own[c.name].value)]
        if unpaired:
            gaps.append(f"{at}: {method} has no speedup on {', '.join(unpaired)}: no AR sample of its seeds")
    return gaps


def _notes(table: PaperTable) -> str:
    made_by = table.results.runs_sentence
    return (
        "Layout of the paper's table; these are this target's own numbers. Speedup: tokens per second of decoding over AR's, "
        "same prompts, same run, prefill left out. τ: tokens emitted after the prefill's token / verification rounds (bonus "
        "token included, last round clipped); accepted: draft tokens kept per round. Seeds of a prompt are pooled, then rounds "
        "within a benchmark; Average: plain mean of the columns. Bold: best of a column at a temperature, where no method "
        f"lacks it; {GAP}: not measured. Loops: share of answers that end in a loop. Brackets: {LEVEL:.0%} percentile "
        f"bootstrap over prompts, {table.num_resamples} resamples, seed {table.seed}; they cover the choice of prompts, not "
        f"the training seed nor the target.{made_by}"
    )
