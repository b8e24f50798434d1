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
from hyperdflash.report.measure import Sample
from hyperdflash.report.paper import (
    PAPER_COLUMNS,
    Column,
    PaperTable,
    figure1_results,
    paper_blocks,
    paper_table,
    to_json,
    write_paper_report,
)
from hyperdflash.report.tables import markdown

COLUMNS = (Column("a", "Alpha", "Math"), Column("b", "Beta", "Chat"))


def cell(method, benchmark, emitted, rounds, seconds, *, looped=(False, False), slots=2, seed=0, **other) -> Sample:
    """Two prompts; slot 1 takes as many accepted drafts as it can."""
    emitted, rounds = np.array(emitted), np.array(rounds)
    accepted = emitted - rounds
    first = np.minimum(accepted, rounds)
    survived = np.stack([first, accepted - first], axis=1)[:, :slots]
    reached = np.stack([rounds, first], axis=1)[:, :slots]
    counts = PromptCounts(emitted, accepted, rounds, survived, reached)
    return Sample(
        method,
        0.0,
        (f"{benchmark}/p", f"{benchmark}/q"),
        (benchmark, benchmark),
        counts,
        np.array(looped),
        run=f"run {method}",
        mode="non_think",
        seconds=np.array(seconds),
        seeds=(seed,),
    )


def value(table: PaperTable, method: str, metric: str, group: str = MEAN, slot: int | None = None) -> float:
    return table.results.get(method, metric, group, slot).value


def paper_text(table: PaperTable, target: str = "t") -> str:
    return markdown(paper_blocks(table, target))


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
    assert [value(table, "X", "tau", name) for name in ("a", "b", MEAN)] == [2.0, 1.5, 1.75]
    assert [value(table, "X", "speedup", name) for name in ("a", "b", MEAN)] == pytest.approx([2.4, 2.0, 2.2])
    assert [value(table, "Y", "tau", name) for name in ("a", "b", MEAN)] == [1.5, 3.0, 2.25]
    assert (value(table, "Y", "looping_share", "a"), value(table, "Y", "tau_without_loops", "a")) == (0.5, 1.0)
    assert (value(table, "X", "prompts"), value(table, "X", "rounds"), value(table, "X", "tokens_per_second", "a")) == (
        4,
        14,
        24,
    )
    assert [value(table, "X", "survival", "b", slot) for slot in (1, 2)] == [0.5, 0.0]
    tau, speedup = table.results.get("X", "tau", "a"), table.results.get("Y", "speedup", "b")
    assert tau.low == tau.high == 2.0  # both prompts alike
    assert speedup.low < speedup.value < speedup.high
    assert value(table, "generate", "speedup", "a") == pytest.approx(0.5)


def test_seeds_are_pooled_by_prompt(cells):
    again = [
        cell("X", "a", [3, 9], [3, 3], [1.0, 1.0], seed=1, looped=(True, False)),
        cell("AR", "a", [2, 2], [2, 2], [0.1, 0.1], slots=0, seed=1),
    ]
    table = paper_table([*cells, *again], "non_think", COLUMNS, num_resamples=20)
    assert [value(table, "X", name, "a") for name in ("seeds", "prompts", "rounds")] == [2, 2, 12]
    assert value(table, "X", "tau", "a") == 2.0 and value(table, "X", "looping_share", "a") == 0.25
    assert value(table, "X", "tau_without_loops", "a") == pytest.approx(21 / 9)
    assert value(table, "X", "speedup", "a") == pytest.approx((24 / 2.5) / (14 / 1.2))
    assert value(table, "X", "speedup", "b") == pytest.approx(2.0) and value(table, "X", "seeds", "b") == 1
    # Y has seed 0 alone, and so is its AR
    assert value(table, "Y", "speedup", "a") == pytest.approx(1.2)
    without = paper_table([*cells, again[0]], "non_think", COLUMNS, num_resamples=20)  # AR of seed 1 is not there
    assert math.isnan(value(without, "X", "speedup", "a"))


def test_markdown_has_the_papers_layout(cells):
    text = paper_text(paper_table(cells, "non_think", COLUMNS, num_resamples=20), "assets/tiny")
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
    partial = [c for c in cells if (c.method, c.groups[0]) not in (("X", "b"), ("AR", "a"))]
    table = paper_table(partial, "non_think", COLUMNS, methods=("X", "Z"), num_resamples=20)
    text = paper_text(table)
    assert "| X | - | 2.00 | - | - | - | - |" in text.replace("**", "")
    assert "| Z | - | - | - | - | - | - |" in text
    assert "| X | - | **2.00** | - |" in text and "| Y | - | 1.50 | 1.20× | 3.00 |" in text  # X lacks b: no best there
    other = paper_table([c for c in cells if (c.method, c.groups[0]) != ("Y", "b")], "non_think", COLUMNS, num_resamples=20)
    assert "| X | **2.40×** | **2.00** | 2.00× | 1.50 | 2.20× | 1.75 |" in paper_text(other)
    assert table.missing == (
        "T = 0: X lacks Beta, so it has no Average",
        "T = 0: X has no speedup on Alpha: no AR sample of its seeds",
        "T = 0: Z was not measured",
        "T = 0: Y has no speedup on Alpha: no AR sample of its seeds",
    )
    assert all(f"- {gap}" in text for gap in table.missing)
    rows = list(csv.DictReader(io.StringIO(table.results.csv_text())))
    measured = {(r["method"], r["group"]): r["value"] for r in rows if r["metric"] == "speedup"}
    assert {key for key in measured if key[0] == "X"} == {("X", "a")} and measured["X", "a"] == ""
    data = json.loads(json.dumps(to_json(table, "t"), allow_nan=False))
    assert {row["group"] for row in data["rows"] if row["method"] == "X"} == {"a"}
    assert [
        row["value"] for row in data["rows"] if (row["method"], row["group"], row["metric"]) == ("Y", "mean", "speedup")
    ] == [None]
    nothing = paper_table(cells, "think_high", COLUMNS)
    assert nothing.number == 3 and nothing.missing == ("think_high: nothing was measured",)


def test_ar_of_another_seed_is_no_reference(cells):
    moved = [replace(c, seeds=(1,)) if c.method == "X" else c for c in cells]
    table = paper_table(moved, "non_think", COLUMNS, num_resamples=20)
    assert math.isnan(value(table, "X", "speedup", "a"))
    assert "T = 0: X has no speedup on Alpha, Beta: no AR sample of its seeds" in table.missing


def test_the_record_holds_every_detail(cells):
    table = paper_table(cells, "non_think", COLUMNS, num_resamples=20)
    rows = [row for row in csv.DictReader(io.StringIO(table.results.csv_text())) if row["metric"] == "tau"]
    assert len(rows) == 3 + 1 + 3 + 3  # generate has one column and so no Average
    details = {name: value(table, "Y", name, "a") for name in ("tau", "rounds", "seeds", "looping_share")}
    assert details == {"tau": 1.5, "rounds": 8, "seeds": 1, "looping_share": 0.5}


def test_the_papers_columns():
    titles = [column.title for column in PAPER_COLUMNS]
    assert titles == ["GSM8K", "MATH-500", "AIME25", "HumanEval", "MBPP", "LCB", "MT-Bench"]
    assert [column.group for column in PAPER_COLUMNS] == ["Math"] * 3 + ["Code"] * 3 + ["Chat"]


def test_figure_1_averages_what_every_method_has(cells):
    partial = [c for c in cells if (c.method, c.groups[0]) != ("Y", "b")]
    table = paper_table(partial, "non_think", COLUMNS, num_resamples=20)
    found = figure1_results(table, partial)
    assert found.groups == ("Alpha", MEAN)
    assert [found.get(method, "tau").value for method in found.distinct("method")] == [2.0, 1.5]
    apart = [c for c in cells if (c.method, c.groups[0]) in (("X", "a"), ("Y", "b"))]
    assert figure1_results(paper_table(apart, "non_think", COLUMNS, num_resamples=20), apart) is None


def test_everything_is_written(cells, tmp_path):
    high = [replace(c, mode="think_high", temperature=1.0) for c in cells if c.groups[0] == "a"]
    written = write_paper_report([*cells, *high], tmp_path, "assets/tiny", COLUMNS, num_resamples=20)
    names = {path.name for path in written}
    assert names == {"paper.md", "paper.json", "paper.csv", "figure1_non_think.png", "figure1_think_high.png"}
    assert "### Table 3: Think-high mode" in (tmp_path / "paper.md").read_text()
    assert len(json.loads((tmp_path / "paper.json").read_text())) == 2
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names if name.endswith(".png"))
    with pytest.raises(ValueError, match="no samples to report"):
        write_paper_report([], tmp_path, "t")


def test_refuses(cells):
    with pytest.raises(ValueError, match=r"X on a .* was given more than once"):
        paper_table([*cells, cells[3]], "non_think", COLUMNS)
    with pytest.raises(ValueError, match="different prompts of a at T = 0"):
        paper_table([*cells[:3], replace(cells[3], prompt_ids=("a/p", "a/r"))], "non_think", COLUMNS)
    with pytest.raises(ValueError, match="fits no column; columns are a"):
        paper_table(cells, "non_think", COLUMNS[:1])
    with pytest.raises(ValueError, match="mode must be non_think or think_high"):
        paper_table(cells, "think", COLUMNS)
    with pytest.raises(ValueError, match="each needs one entry per prompt"):
        replace(cells[0], seconds=np.zeros(3))
    with pytest.raises(ValueError, match="samples with draft slots and samples without"):
        paper_table([*cells, replace(cells[3], method="AR", seeds=(5,))], "non_think", COLUMNS)
    with pytest.raises(ValueError, match="differ in prompts or draft slots"):
        paper_table([*cells, cell("X", "a", [6, 6], [3, 3], [1, 1], slots=1, seed=3)], "non_think", COLUMNS)
