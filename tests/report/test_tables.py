"""From results to text: numbers are the summary's, every format parses, wrong input is refused."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from hyperdflash.report.bootstrap import MEAN, PromptCounts
from hyperdflash.report.summary import MethodResult, summarise
from hyperdflash.report.tables import CSV_HEADER, csv_text, markdown_report, metrics_dict, terminal_table


@pytest.fixture(scope="module")
def hand_made():
    """Two prompts a domain; the second of each loops."""

    def result(name: str, emitted, rounds, slots=3) -> MethodResult:
        emitted, rounds = np.array(emitted), np.array(rounds)
        survived = np.tile((emitted - rounds)[:, None] // slots, (1, slots))
        counts = PromptCounts(emitted, emitted - rounds, rounds, survived, np.tile(rounds[:, None], (1, slots)))
        looped = np.array([False, True, False, True])
        return MethodResult(name, 0.0, ("p", "q", "r", "s"), ("math", "math", "code", "code"), counts, looped, "run-7")

    return [result("A", [8, 12, 10, 6], [4, 3, 5, 2]), result("B", [8, 12, 9, 6], [8, 3, 9, 6])]


def test_summary_hand_computed(hand_made):
    summary = summarise(hand_made, baseline="B", num_resamples=100)
    groups = summary.methods[0].groups
    assert summary.groups == ("math", "code", MEAN)
    assert groups["math"].tau.value == pytest.approx(20 / 7) and groups["code"].tau.value == pytest.approx(16 / 7)
    assert groups[MEAN].tau.value == pytest.approx(18 / 7)
    assert groups["math"].tau_without_loops.value == 2.0 and groups[MEAN].tau_without_loops.value == 2.0
    assert groups["math"].accepted.value == pytest.approx(13 / 7)
    assert groups[MEAN].looping_share == 0.5
    assert (groups["code"].prompts, groups["code"].rounds, groups[MEAN].prompts, groups[MEAN].rounds) == (2, 7, 4, 14)
    difference = summary.difference("A", 0.0)
    assert difference.tau["math"].value == pytest.approx(20 / 7 - 20 / 11)
    assert summary.difference("B", 0.0) is None


def test_markdown(hand_made):
    text = markdown_report(summarise(hand_made, baseline="B", num_resamples=100))
    row = next(line for line in text.splitlines() if line.startswith("| A |"))
    assert "**2.86** [" in row and "**2.29** [" in row and "| 50.0% |" in row
    assert "**" not in next(line for line in text.splitlines() if line.startswith("| B |"))
    assert "run-7" in text and "+1.04 [" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_every_markdown_table_is_rectangular(make_results):
    text = markdown_report(summarise(make_results(), baseline="MTP (6)", num_resamples=50))
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1
    assert text.count("### Temperature") == 2
    assert text.count("**") == 2 * 2 * 4  # one best a column and temperature


def test_terminal(make_results):
    summary = summarise(make_results(), baseline="MTP (6)", num_resamples=50)
    console = Console(width=130, file=io.StringIO(), record=True)
    console.print(terminal_table(summary))
    text = console.export_text()
    assert text.count("HyperDFlash (6)") == 2 and "temperature 1" in text and "40 math, 30 code, 20 chat" in text
    assert "…" not in text


def test_csv(make_results):
    summary = summarise(make_results(), baseline="MTP (6)", num_resamples=50)
    rows = list(csv.DictReader(io.StringIO(csv_text(summary))))
    assert tuple(rows[0]) == CSV_HEADER
    wanted = {"temperature": "1", "method": "MTP (3)", "group": "code", "metric": "survival", "slot": "3"}
    found = [row for row in rows if wanted.items() <= row.items()]
    method = next(m for m in summary.at(1.0) if m.name == "MTP (3)")
    assert len(found) == 1
    assert float(found[0]["value"]) == pytest.approx(method.groups["code"].survival[2].value, abs=1e-6)
    assert sum(row["metric"] == "tau minus MTP (6)" for row in rows) == 2 * 5 * 4


def test_json_has_no_nan(make_results):
    rates = {"never": (0.0,) * 6, "MTP (6)": (0.5,) * 6}
    results = make_results(rates=rates)
    results = [
        replace(r, counts=replace(r.counts, reached=r.counts.reached * (np.arange(6) < 3))) for r in results
    ]  # slot 4 on was never verified
    data = json.loads(json.dumps(metrics_dict(summarise(results, "MTP (6)", 50)), allow_nan=False))
    method = data["methods"][0]
    assert method["groups"]["mean"]["conditional"][5] == {"value": None, "low": None, "high": None}
    assert method["groups"]["math"]["tau"]["value"] >= 1
    assert data["interval"]["level"] == 0.95 and data["domains"] == ["math", "code", "chat"]
    assert {d["name"] for d in data["differences"]} == {"never"}


def test_without_any_answer_left_everything_is_na(hand_made):
    looping = [replace(r, looped=np.ones(4, bool)) for r in hand_made]
    summary = summarise(looping, "B", 20)
    assert math.isnan(summary.methods[0].groups[MEAN].tau_without_loops.value)
    assert "n/a" in markdown_report(summary)


def test_refuses(hand_made):
    one, two = hand_made
    with pytest.raises(ValueError, match="no results"):
        summarise([], "A")
    with pytest.raises(ValueError, match=r"baseline 'C' has no result at temperature 0; got \['A', 'B'\]"):
        summarise(hand_made, "C")
    with pytest.raises(ValueError, match="different prompts"):
        summarise([one, replace(two, prompt_ids=("p", "q", "r", "t"))], "A")
    with pytest.raises(ValueError, match="disagree on which answers loop"):
        summarise([one, replace(two, looped=np.zeros(4, bool))], "A")
    with pytest.raises(ValueError, match="distinct names"):
        summarise([one, one], "A")
    with pytest.raises(ValueError, match="one entry a prompt"):
        replace(one, domains=("math",))


def test_report_imports_no_torch():
    code = (
        "import sys, hyperdflash.report.figures, hyperdflash.report.tables\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules), 'torch or pyplot'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
