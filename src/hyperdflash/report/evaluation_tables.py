"""Renders an evaluation's tables: those of a replay (the demo's), and the paper's Tables 2 and 3 and Figure 1, by decoding.

Replay: tau first, a column per domain, then their plain mean; the best of a column and temperature is bold.

Table 2 is Non-thinking, Table 3 Think-high; a section per temperature, a row per method, speedup and tau in a column pair per
benchmark, grouped Math, Code, Chat; Average is the plain mean of the columns. A column without a measurement is a gap, and so
is the Average beside it.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from hyperdflash.data.benchmark_rows import BENCHMARKS
from hyperdflash.report.bootstrap import MEAN
from hyperdflash.report.figures import results_figure
from hyperdflash.report.measure import AUTOREGRESSIVE, Sample, measure
from hyperdflash.report.results import MINUS_BASELINE, Results, write_report
from hyperdflash.report.tables import GAP, Block, Table, bold_best, estimate_text, markdown, number_text, or_gap, rates_table

MODES = {"non_think": (2, "Non-thinking"), "think_high": (3, "Think-high")}  # table number and name in the paper
METRICS = ("tau", "speedup", "accepted", "tokens_per_second", "looping_share", "tau_without_loops")
# benchmark -> title and group as printed
PAPER_COLUMNS = {name: ("LCB" if name == "livecodebench" else own.title, own.group) for name, own in BENCHMARKS.items()}


def acceptance_blocks(found: Results, baseline: str) -> list[Block]:
    """Returns tables of tau, differences to ``baseline`` and positions per temperature, then their definitions."""
    blocks: list[Block] = []
    for temperature in found.distinct("temperature"):
        here = found.at(temperature=temperature)
        rates = {method: here.rates(method) for method in here.distinct("method")}
        blocks += [f"### Temperature {temperature:g}", _taus(here)]
        blocks += [f"Difference in tau to {baseline}, paired by prompt:", _differences(here, baseline)]
        blocks += ["Acceptance per drafted position, plain mean over domains, %:", rates_table(rates)]
    notes = (
        "τ: tokens emitted after the prefill's token / verification rounds (bonus token included, last round clipped); "
        "accepted: draft tokens kept per round. Pooled over rounds within a domain; mean: plain mean over domains. "
        "Survival: share of all rounds that accepted at least k drafts; conditional: share that accepted slot k among "
        f"rounds that accepted the earlier ones and had a slot k. {found.brackets}"
    )
    return [*blocks, notes]


def _taus(here: Results) -> Table:
    methods, groups = here.distinct("method"), here.groups
    taus = [[here.get(method, "tau", group) for method in methods] for group in groups]
    columns = [bold_best([e.value for e in own], list(map(estimate_text, own))) for own in taus]
    columns.append([number_text(here.get(method, "accepted").value) for method in methods])
    columns.append([f"{here.get(method, 'looping_share').value:.1%}" for method in methods])
    columns.append([number_text(here.get(method, "tau_without_loops").value) for method in methods])
    columns += [[str(here.count(method, name)) for method in methods] for name in ("prompts", "rounds")]
    header = ["Method", *(f"{g} τ" for g in groups), "accepted", "loops", "τ without loops", "prompts", "rounds"]
    return Table(header, [list(row) for row in zip(methods, *columns, strict=True)])


def _differences(here: Results, baseline: str) -> Block:
    rows = [
        [method, *(estimate_text(here.get(method, MINUS_BASELINE, group), signed=True) for group in here.groups)]
        for method in here.distinct("method")
        if method != baseline
    ]
    return Table(["Method", *here.groups], rows) if rows else "(no other method)"


def columns_of(benchmarks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns the paper's columns, or one per domain for prompts from elsewhere."""
    own = dict.fromkeys(benchmarks)
    return PAPER_COLUMNS if own.keys() <= PAPER_COLUMNS.keys() else {name: (name, "Held-out") for name in own}


def write_paper_report(
    samples: Sequence[Sample], out: Path | str, target: str, num_resamples: int = 2000, seed: int = 0
) -> list[Path]:
    """Writes paper.md, the record as paper.csv and a Figure 1 per mode; returns their paths. ``target`` names the model that
    was measured: every table and figure says so. Modes without a sample are left out."""
    columns = columns_of([name for s in samples for name in s.groups])
    texts, rows, details, pictures = [], [], {}, []
    for mode in MODES:
        own = [s for s in samples if s.mode == mode]
        if not own:
            continue
        found = measure(own, "", tuple(columns), num_resamples, seed)
        texts.append(markdown(paper_blocks(found, mode, columns, target)))
        rows += found.rows
        details |= found.details
        drafting = [s for s in own if s.method != AUTOREGRESSIVE]
        if drafting:
            title = f"Figure 1 ({MODES[mode][1]}), target {target}"
            drawn = measure(drafting, "", (), num_resamples, seed)
            pictures.append(results_figure(drawn, Path(out) / f"figure1_{mode}.png", title))
    record = Results(tuple(rows), details).csv_text()
    return [*write_report(out, {"paper.md": "\n".join(texts), "paper.csv": record}), *pictures]


def paper_blocks(found: Results, mode: str, columns: dict[str, tuple[str, str]], target: str) -> list[Block]:
    """Returns the table, its gaps, details and notes; ``columns``: benchmark -> title and group."""
    number, name = MODES[mode]
    titles = {column: title for column, (title, _) in columns.items()} | {MEAN: "Average"}
    methods = [method for method in found.distinct("method") if method != AUTOREGRESSIVE]
    sections = {t: found.at(temperature=t) for t in sorted(found.distinct("temperature"))}
    groups = [group.upper() for _, group in columns.values()]
    groups = [group if group not in groups[:i] else "" for i, group in enumerate(groups)] + ["AVG."]
    # the paper's three lines of headings, each over its first column, as Markdown merges no cells
    rows = [["", *(text for title in titles.values() for text in (title, ""))]]
    for temperature, here in sections.items():
        rows.append([f"*Temperature = {temperature:g}*", *["*Speedup*", "*τ*"] * len(groups)])
        pairs = [(group, *pair) for group in titles for pair in (("speedup", "×"), ("tau", ""))]
        cells = []
        for group, metric, unit in pairs:
            values = [here.get(method, metric, group).value for method in methods]
            cells.append(bold_best(values, [GAP if math.isnan(v) else f"{number_text(v)}{unit}" for v in values]))
        rows += [list(row) for row in zip(methods, *cells, strict=True)]
    header = ["Method", *(text for group in groups for text in (group, ""))]
    blocks: list[Block] = [f"### Table {number}: {name} mode, target {target}", Table(header, rows)]
    if missing := [title for column, title in titles.items() if column not in (*found.groups, MEAN)]:
        blocks.append(f"Missing, and so the Average: {', '.join(missing)}.")
    for temperature, here in sections.items():
        blocks += [f"Details, temperature {temperature:g}:", _details(here, titles)]
    notes = (
        "Layout of the paper's table; these are this target's own numbers. Speedup: tokens per second of decoding over AR's, "
        "same prompts, same run, prefill left out. τ: tokens emitted after the prefill's token / verification rounds (bonus "
        "token included, last round clipped); accepted: draft tokens kept per round. Rounds are pooled within a benchmark; "
        f"Average: plain mean of the columns. Bold: best of a column at a temperature; {GAP}: not measured. Loops: share of "
        f"answers that end in a loop. {found.brackets}"
    )
    return [*blocks, notes]


def _details(here: Results, titles: dict[str, str]) -> Table:
    rows = []
    for method in here.distinct("method"):
        for group in here.groups:
            own = {metric: here.get(method, metric, group) for metric in METRICS}
            rows.append([method if group == here.groups[0] else "", titles[group], estimate_text(own["tau"])])
            rows[-1] += [or_gap(estimate_text(own["speedup"])), number_text(own["accepted"].value)]
            rows[-1] += [or_gap(number_text(own["tokens_per_second"].value, 1))]
            rows[-1] += [str(here.count(method, name, group)) for name in ("prompts", "rounds")]
            rows[-1] += [f"{own['looping_share'].value:.1%}", number_text(own["tau_without_loops"].value)]
    header = ["Method", "Benchmark", "τ", "Speedup", "accepted", "tokens/s", "prompts", "rounds", "loops", "τ without loops"]
    return Table(header, rows)
