"""Tables 2 and 3: numbers by hand, gaps stay gaps, wrong input is refused."""

from __future__ import annotations

import csv
import io
from dataclasses import fields, replace

import numpy as np
import pytest

from hyperdflash.report.bootstrap import MEAN, PromptCounts
from hyperdflash.report.evaluation_tables import PAPER_COLUMNS, columns_of, paper_blocks, write_paper_report
from hyperdflash.report.measure import Sample, measure
from hyperdflash.report.results import Results
from hyperdflash.report.tables import markdown

COLUMNS = {"a": ("Alpha", "Math"), "b": ("Beta", "Chat")}


def sample(method, emitted, rounds, seconds, *, looped=(False,) * 4, slots=2, groups=("a", "a", "b", "b")) -> Sample:
    """Two prompts per benchmark; slot 1 takes as many accepted drafts as it can."""
    emitted, rounds = np.array(emitted), np.array(rounds)
    accepted = emitted - rounds
    first = np.minimum(accepted, rounds)
    survived = np.stack([first, accepted - first], axis=1)[:, :slots]
    reached = np.stack([rounds, first], axis=1)[:, :slots]
    counts = PromptCounts(emitted, accepted, rounds, survived, reached)
    ids = tuple(f"{group}/{i}" for i, group in enumerate(groups))
    times = np.array(seconds)
    return Sample(method, 0.0, ids, groups, counts, np.array(looped), f"run {method}", "non_think", times)


def value(found: Results, method: str, metric: str, group: str = MEAN, slot: int | None = None) -> float:
    return found.get(method, metric, group, slot).value


def measured(samples) -> Results:
    return measure(samples, "", tuple(COLUMNS), num_resamples=50)


def paper_text(found: Results, target: str = "t") -> str:
    return markdown(paper_blocks(found, "non_think", COLUMNS, target))


@pytest.fixture
def samples():
    """AR makes 10 tokens/s on a and 5 on b; X 6 in 0.25 s each on a; Y loops on its second prompt of a."""
    return [
        sample("AR", [4, 6, 5, 5], [4, 6, 5, 5], [0.4, 0.6, 1.0, 1.0], slots=0),
        sample("X", [6, 6, 4, 8], [3, 3, 4, 4], [0.25, 0.25, 0.6, 0.6]),
        sample("Y", [4, 8, 9, 9], [4, 4, 3, 3], [0.5, 0.5, 1.0, 2.0], looped=(False, True, False, False)),
    ]


def of_a(own: Sample) -> Sample:
    """The prompts of benchmark a alone."""
    counts = PromptCounts(*(getattr(own.counts, field.name)[:2] for field in fields(PromptCounts)))
    cut = {"looped": own.looped[:2], "seconds": own.seconds[:2]}
    return replace(own, prompt_ids=own.prompt_ids[:2], groups=own.groups[:2], counts=counts, **cut)


def test_numbers_by_hand(samples):
    found = measured(samples)
    assert [value(found, "X", "tau", name) for name in ("a", "b", MEAN)] == [2.0, 1.5, 1.75]
    assert [value(found, "X", "speedup", name) for name in ("a", "b", MEAN)] == pytest.approx([2.4, 2.0, 2.2])
    assert [value(found, "Y", "tau", name) for name in ("a", "b", MEAN)] == [1.5, 3.0, 2.25]
    assert (value(found, "Y", "looping_share", "a"), value(found, "Y", "tau_without_loops", "a")) == (0.5, 1.0)
    numbers = [value(found, "X", *place) for place in (("prompts",), ("rounds",), ("tokens_per_second", "a"))]
    assert numbers == [4, 14, 24]
    assert [value(found, "X", "survival", "b", slot) for slot in (1, 2)] == [0.5, 0.0]
    tau, speedup = found.get("X", "tau", "a"), found.get("Y", "speedup", "b")
    assert tau.low == tau.high == 2.0  # both prompts alike
    assert speedup.low < speedup.value < speedup.high


def test_markdown_has_the_papers_layout(samples):
    text = paper_text(measured(samples), "assets/tiny")
    lines = text.splitlines()
    assert lines[0] == "### Table 2: Non-thinking mode, target assets/tiny"
    assert lines[2] == "| Method | MATH |  | CHAT |  | AVG. |  |"
    assert lines[4] == "|  | Alpha |  | Beta |  | Average |  |"
    assert lines[5] == "| *Temperature = 0* | *Speedup* | *τ* | *Speedup* | *τ* | *Speedup* | *τ* |"
    assert lines[6] == "| X | **2.40×** | **2.00** | **2.00×** | 1.50 | **2.20×** | 1.75 |"
    assert lines[7] == "| Y | 1.20× | 1.50 | 1.20× | **3.00** | 1.20× | **2.25** |"
    assert "Missing" not in text and "run X" in text
    assert "| Y | Alpha | 1.50 [1.00, 2.00] | 1.20 [" in text and "| 50.0% | 1.00 |" in text
    assert "| AR | Alpha | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 0.00 | 10.0 |" in text
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1


def test_gaps_stay_gaps(samples):
    found = measured([of_a(own) for own in samples])
    text = paper_text(found)
    assert "| X | **2.40×** | **2.00** | - | - | - | - |" in text and "Missing, and so the Average: Beta." in text
    rows = list(csv.DictReader(io.StringIO(found.csv_text())))
    assert {(r["method"], r["group"]) for r in rows if r["metric"] == "speedup"} == {("AR", "a"), ("X", "a"), ("Y", "a")}
    without = paper_text(measured(samples[1:]))
    assert "| X | - | **2.00** | - | 1.50 | - | 1.75 |" in without and "| AR |" not in without


def test_the_papers_columns():
    titles, groups = zip(*PAPER_COLUMNS.values(), strict=True)
    assert titles == ("GSM8K", "MATH-500", "AIME25", "HumanEval", "MBPP", "LCB", "MT-Bench")
    assert groups == ("Math",) * 3 + ("Code",) * 3 + ("Chat",)
    assert columns_of(["gsm8k"]) == PAPER_COLUMNS and columns_of(["b", "a", "b"]) == {n: (n, "Held-out") for n in "ba"}


def test_everything_is_written(samples, tmp_path):
    high = [replace(of_a(own), mode="think_high", temperature=1.0) for own in samples]
    written = write_paper_report([*samples, *high], tmp_path, "assets/tiny", num_resamples=20)
    names = {path.name for path in written}
    assert names == {"paper.md", "paper.csv", "figure1_non_think.png", "figure1_think_high.png"}
    assert "### Table 3: Think-high mode" in (tmp_path / "paper.md").read_text()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "paper.csv").read_text())))
    assert {(row["mode"], row["run"]) for row in rows if row["method"] == "X"} == {
        (m, "run X") for m in ("non_think", "think_high")
    }
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names if name.endswith(".png"))


def test_refuses(samples):
    with pytest.raises(ValueError, match="different prompts at T = 0"):
        measured([*samples[:2], replace(samples[2], prompt_ids=("a/0", "a/9", "b/2", "b/3"))])
    with pytest.raises(ValueError, match="each needs one entry per prompt"):
        replace(samples[0], seconds=np.zeros(3))
