"""Tables 2 and 3: numbers by hand, gaps stay gaps, wrong input is refused."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hyperdflash.report.bootstrap import MEAN, PromptCounts
from hyperdflash.report.paper import figure1_summary, paper_table
from hyperdflash.report.paper_cells import PAPER_COLUMNS, Column, PaperCell
from hyperdflash.report.paper_tables import details_csv, paper_dict, paper_markdown, table_csv, write_paper_report

COLUMNS = (Column("a", "Alpha", "Math"), Column("b", "Beta", "Chat"))


def cell(method, benchmark, emitted, rounds, seconds, *, looped=(False, False), slots=2, **other) -> PaperCell:
    """Two prompts; slot 1 takes as many accepted drafts as it can."""
    emitted, rounds = np.array(emitted), np.array(rounds)
    accepted = emitted - rounds
    first = np.minimum(accepted, rounds)
    survived = np.stack([first, accepted - first], axis=1)[:, :slots]
    reached = np.stack([rounds, first], axis=1)[:, :slots]
    counts = PromptCounts(emitted, accepted, rounds, survived, reached)
    fields = {"mode": "non_think", "temperature": 0.0, "seed": 0, "run_id": f"run {method}"} | other
    ids = (f"{benchmark}/p", f"{benchmark}/q")
    return PaperCell(
        method, benchmark, prompt_ids=ids, counts=counts, looped=np.array(looped), seconds=np.array(seconds), **fields
    )


@pytest.fixture
def cells():
    """AR makes 10 tokens/s on a and 5 on b; X 6 in 0.5 s each on a; Y loops on its second prompt of a."""
    return [
        cell("AR", "a", [4, 6], [4, 6], [0.4, 0.6], slots=0),
        cell("AR", "b", [5, 5], [5, 5], [1.0, 1.0], slots=0),
        cell("generate", "a", [4, 6], [4, 6], [0.8, 1.2], slots=0),
        cell("X", "a", [6, 6], [3, 3], [0.25, 0.25]),
        cell("X", "b", [4, 8], [4, 4], [0.6, 0.6]),
        cell("Y", "a", [4, 8], [4, 4], [0.5, 0.5], looped=(False, True)),
        cell("Y", "b", [9, 9], [3, 3], [1.0, 2.0]),
    ]


def test_numbers_by_hand(cells):
    table = paper_table(cells, "non_think", COLUMNS, num_resamples=50)
    assert (table.methods, table.plain, table.missing) == (("X", "Y"), ("AR", "generate"), ())
    (section,) = table.sections
    x, y = section.entries["X"], section.entries["Y"]
    assert [x[name].summary.tau.value for name in ("a", "b", MEAN)] == [2.0, 1.5, 1.75]
    assert [x[name].speedup.value for name in ("a", "b", MEAN)] == pytest.approx([2.4, 2.0, 2.2])  # 24, 10 tokens/s
    assert [y[name].summary.tau.value for name in ("a", "b", MEAN)] == [1.5, 3.0, 2.25]
    assert (y["a"].summary.looping_share, y["a"].summary.tau_without_loops.value) == (0.5, 1.0)
    assert (x[MEAN].summary.prompts, x[MEAN].summary.rounds, x["a"].tokens_per_second) == (4, 14, 24.0)
    assert [e.value for e in x["b"].summary.survival] == [0.5, 0.0]
    assert x["a"].summary.tau.low == x["a"].summary.tau.high == 2.0  # both prompts alike
    assert y["b"].speedup.low < y["b"].speedup.value < y["b"].speedup.high
    assert section.entries["generate"]["a"].speedup.value == pytest.approx(0.5)


def test_seeds_are_pooled_by_prompt(cells):
    again = [
        cell("X", "a", [3, 9], [3, 3], [1.0, 1.0], seed=1, looped=(True, False)),
        cell("AR", "a", [2, 2], [2, 2], [0.1, 0.1], slots=0, seed=1),
    ]
    table = paper_table([*cells, *again], "non_think", COLUMNS, num_resamples=20)
    entry = table.sections[0].entries["X"]["a"]
    assert entry.seeds == (0, 1) and entry.summary.prompts == 2 and entry.summary.rounds == 12
    assert entry.summary.tau.value == 2.0 and entry.summary.looping_share == 0.25
    assert entry.summary.tau_without_loops.value == pytest.approx(21 / 9)
    assert entry.speedup.value == pytest.approx((24 / 2.5) / (14 / 1.2))
    # Y has seed 0 alone, and so is its AR
    assert table.sections[0].entries["Y"]["a"].speedup.value == pytest.approx(1.2)
    without = paper_table([*cells, again[0]], "non_think", COLUMNS, num_resamples=20)  # AR of seed 1 is not there
    assert math.isnan(without.sections[0].entries["X"]["a"].speedup.value)


def test_markdown_has_the_papers_layout(cells):
    text = paper_markdown(paper_table(cells, "non_think", COLUMNS, num_resamples=20), "assets/tiny")
    lines = text.splitlines()
    assert lines[0] == "### Table 2: Non-thinking mode, target assets/tiny"
    assert lines[2] == "| Method | MATH |  | CHAT |  | AVG. |  |"
    assert lines[4] == "|  | Alpha |  | Beta |  | Average |  |"
    assert lines[5] == "| *Temperature = 0* | *Speedup* | *τ* | *Speedup* | *τ* | *Speedup* | *τ* |"
    assert lines[6] == "| X | **2.40×** | **2.00** | **2.00×** | 1.50 | **2.20×** | 1.75 |"
    assert lines[7] == "| Y | 1.20× | 1.50 | 1.20× | **3.00** | 1.20× | **2.25** |"
    assert "Missing" not in text and "run X" in text
    assert "| Y | Alpha | 1.50 [1.00, 2.00] | 1.20 [" in text and "| 50.0% | 1.00 |" in text
    assert "| generate / AR | 0 | 0.50 [0.50, 0.50] | - | - |" in text
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1


def test_gaps_stay_gaps(cells):
    partial = [c for c in cells if (c.method, c.benchmark) not in (("X", "b"), ("AR", "a"))]
    table = paper_table(partial, "non_think", COLUMNS, methods=("X", "Z"), num_resamples=20)
    text = paper_markdown(table, "t")
    assert "| X | - | 2.00 | - | - | - | - |" in text.replace("**", "")
    assert "| Z | - | - | - | - | - | - |" in text
    assert "| X | - | **2.00** | - |" in text and "| Y | - | 1.50 | 1.20× | 3.00 |" in text  # X lacks b: no best there
    other = paper_table([c for c in cells if (c.method, c.benchmark) != ("Y", "b")], "non_think", COLUMNS, num_resamples=20)
    assert "| X | **2.40×** | **2.00** | 2.00× | 1.50 | 2.20× | 1.75 |" in paper_markdown(other, "t")
    assert table.missing == (
        "T = 0: X lacks Beta, so it has no Average",
        "T = 0: X has no speedup on Alpha: no AR cell of its seeds",
        "T = 0: Z was not measured",
        "T = 0: Y has no speedup on Alpha: no AR cell of its seeds",
    )
    assert all(f"- {gap}" in text for gap in table.missing)
    rows = list(csv.DictReader(io.StringIO(table_csv(table))))
    assert [row["method"] for row in rows] == ["X", "Z", "Y"]
    assert (rows[0]["Alpha speedup"], rows[0]["Alpha tau"], rows[0]["Average tau"]) == ("", "2.000000", "")
    data = json.loads(json.dumps(paper_dict(table, "t"), allow_nan=False))
    assert data["sections"][0]["entries"]["X"].keys() == {"a"}
    assert data["sections"][0]["entries"]["Y"]["mean"]["speedup"]["value"] is None
    nothing = paper_table(cells, "think_high", COLUMNS)
    assert nothing.number == 3 and nothing.missing == ("think_high: nothing was measured",)


def test_ar_of_another_seed_is_no_reference(cells):
    moved = [replace(c, seed=1) if c.method == "X" else c for c in cells]
    table = paper_table(moved, "non_think", COLUMNS, num_resamples=20)
    assert math.isnan(table.sections[0].entries["X"]["a"].speedup.value)
    assert "T = 0: X has no speedup on Alpha, Beta: no AR cell of its seeds" in table.missing


def test_details_csv(cells):
    rows = list(csv.DictReader(io.StringIO(details_csv(paper_table(cells, "non_think", COLUMNS, num_resamples=20)))))
    assert len(rows) == 3 + 1 + 3 + 3  # generate has one column and so no Average
    found = next(row for row in rows if (row["method"], row["benchmark"]) == ("Y", "Alpha"))
    assert (found["tau"], found["rounds"], found["seeds"], found["looping_share"]) == ("1.500000", "8", "0", "0.500000")


def test_the_papers_columns():
    titles = [column.title for column in PAPER_COLUMNS]
    assert titles == ["GSM8K", "MATH-500", "AIME25", "HumanEval", "MBPP", "LCB", "MT-Bench"]
    assert [column.group for column in PAPER_COLUMNS] == ["Math"] * 3 + ["Code"] * 3 + ["Chat"]


def test_figure_1_averages_what_every_method_has(cells):
    partial = [c for c in cells if (c.method, c.benchmark) != ("Y", "b")]
    table = paper_table(partial, "non_think", COLUMNS, num_resamples=20)
    summary = figure1_summary(table, partial)
    assert summary.groups == ("Alpha", MEAN)
    assert [m.groups[MEAN].tau.value for m in summary.methods] == [2.0, 1.5]
    apart = [c for c in cells if (c.method, c.benchmark) in (("X", "a"), ("Y", "b"))]
    assert figure1_summary(paper_table(apart, "non_think", COLUMNS, num_resamples=20), apart) is None


def test_everything_is_written(cells, tmp_path):
    high = [replace(c, mode="think_high", temperature=1.0) for c in cells if c.benchmark == "a"]
    written = write_paper_report([*cells, *high], tmp_path, "assets/tiny", COLUMNS, num_resamples=20)
    names = {path.name for path in written}
    tables = {f"table{n}{suffix}.csv" for n in (2, 3) for suffix in ("", "_details")}
    assert names == {"paper.md", "paper.json", "figure1_non_think.png", "figure1_think_high.png", *tables}
    assert "### Table 3: Think-high mode" in (tmp_path / "paper.md").read_text()
    assert len(json.loads((tmp_path / "paper.json").read_text())) == 2
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names if name.endswith(".png"))
    with pytest.raises(ValueError, match="no cells to report"):
        write_paper_report([], tmp_path, "t")


def test_refuses(cells):
    with pytest.raises(ValueError, match=r"X on a .* was given more than once"):
        paper_table([*cells, cells[3]], "non_think", COLUMNS)
    with pytest.raises(ValueError, match="different a prompts at T = 0"):
        paper_table([*cells[:3], replace(cells[3], prompt_ids=("a/p", "a/r"))], "non_think", COLUMNS)
    with pytest.raises(ValueError, match="fits no column; columns are a"):
        paper_table(cells, "non_think", COLUMNS[:1])
    with pytest.raises(ValueError, match="mode must be non_think or think_high"):
        paper_table(cells, "think", COLUMNS)
    with pytest.raises(ValueError, match="each needs one entry a prompt"):
        replace(cells[0], seconds=np.zeros(3))
    with pytest.raises(ValueError, match="cells with draft slots and cells without"):
        paper_table([*cells, replace(cells[3], method="AR", seed=5)], "non_think", COLUMNS)
    with pytest.raises(ValueError, match="differ in prompts or draft slots"):
        paper_table([*cells, cell("X", "a", [6, 6], [3, 3], [1, 1], slots=1, seed=3)], "non_think", COLUMNS)
