"""From samples to the record and to text: numbers are the record's, every format parses, wrong input is refused."""

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

from hyperdflash.report.bootstrap import MEAN, PromptCounts
from hyperdflash.report.evaluation_tables import acceptance_blocks
from hyperdflash.report.measure import Sample, measure
from hyperdflash.report.results import MINUS_BASELINE, Row
from hyperdflash.report.tables import Table, jsonable, markdown, show, write_page


@pytest.fixture(scope="module")
def hand_made():
    """Two prompts per domain; the second of each loops."""

    def sample(name: str, emitted, rounds, slots=3) -> Sample:
        emitted, rounds = np.array(emitted), np.array(rounds)
        survived = np.tile((emitted - rounds)[:, None] // slots, (1, slots))
        counts = PromptCounts(emitted, emitted - rounds, rounds, survived, np.tile(rounds[:, None], (1, slots)))
        looped = np.array([False, True, False, True])
        return Sample(name, 0.0, ("p", "q", "r", "s"), ("math", "math", "code", "code"), counts, looped, "run-7")

    return [sample("A", [8, 12, 10, 6], [4, 3, 5, 2]), sample("B", [8, 12, 9, 6], [8, 3, 9, 6])]


def report_text(samples, baseline: str, num_resamples: int) -> str:
    return markdown(acceptance_blocks(measure(samples, baseline, num_resamples=num_resamples), baseline))


def test_record_hand_computed(hand_made):
    found = measure(hand_made, baseline="B", num_resamples=100)
    assert found.groups == ("math", "code", MEAN)

    def value(metric, group, method="A"):
        return found.get(method, metric, group).value

    assert value("tau", "math") == pytest.approx(20 / 7) and value("tau", "code") == pytest.approx(16 / 7)
    assert value("tau", MEAN) == pytest.approx(18 / 7)
    assert value("tau_without_loops", "math") == 2.0 and value("tau_without_loops", MEAN) == 2.0
    assert value("accepted", "math") == pytest.approx(13 / 7)
    assert value("looping_share", MEAN) == 0.5
    counts = [found.count("A", metric, group) for group in ("code", MEAN) for metric in ("prompts", "rounds")]
    assert counts == [2, 7, 4, 14]
    assert value(MINUS_BASELINE, "math") == pytest.approx(20 / 7 - 20 / 11)
    assert math.isnan(value(MINUS_BASELINE, "math", "B"))
    assert {row.n for row in found.rows if row.group == "math"} == {2} and {row.over for row in found.rows} == {"prompts"}


def test_markdown(hand_made):
    text = report_text(hand_made, "B", 100)
    row = next(line for line in text.splitlines() if line.startswith("| A |"))
    assert "**2.86** [" in row and "**2.29** [" in row and "| 50.0% |" in row
    assert "**" not in next(line for line in text.splitlines() if line.startswith("| B |"))
    assert "run-7" in text and "+1.04 [" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_every_markdown_table_is_rectangular(make_results):
    text = report_text(make_results(), "MTP (6)", 50)
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1
    assert text.count("### Temperature") == 2
    assert text.count("**") == 2 * 2 * 4  # one best per column and temperature


def test_terminal(make_results, capsys):
    show(report_text(make_results(), "MTP (6)", 50))
    text = capsys.readouterr().out
    assert text.count("HyperDFlash (6)") == 2 * 3 and "Temperature 1" in text  # three tables per temperature
    assert "…" not in text and "**" not in text
    (row,) = [line for line in text.splitlines() if "MTP (3)" in line and "[" in line][:1]
    written = next(line for line in report_text(make_results(), "MTP (6)", 50).splitlines() if line.startswith("| MTP (3) |"))
    assert row.split() == written.replace("|", " ").replace("**", "").split()


def test_html(tmp_path):
    table = Table(["Method", "τ"], [["<A> | a", "**1.0**"]])
    blocks = ["## Taus & more", table, "- a\n- b", "text"]
    text = write_page("t", markdown(blocks), [], tmp_path / "page.html").read_text()
    assert "<h2>Taus &amp; more</h2>" in text
    assert '<td>&lt;A&gt; | a</td>\n<td style="text-align:right"><strong>1.0</strong></td>' in text
    assert "<ul>\n<li>a</li>\n<li>b</li>\n</ul>\n<p>text</p>" in text


def test_csv(make_results):
    found = measure(make_results(), baseline="MTP (6)", num_resamples=50)
    rows = list(csv.DictReader(io.StringIO(found.csv_text())))
    assert tuple(rows[0]) == ("run", *Row._fields)
    wanted = {"temperature": "1", "method": "MTP (3)", "group": "code", "metric": "survival", "slot": "3"}
    mine = [row for row in rows if wanted.items() <= row.items()]
    assert len(mine) == 1 and mine[0]["run"].endswith("stage2_mtp_s0")
    here = found.at(temperature=1.0)
    assert float(mine[0]["value"]) == pytest.approx(here.get("MTP (3)", "survival", "code", 3).value, abs=1e-6)
    assert sum(row["metric"] == MINUS_BASELINE for row in rows) == 2 * 5 * 4


def test_json_has_no_nan(make_results):
    rates = {"never": (0.0,) * 6, "MTP (6)": (0.5,) * 6}
    samples = make_results(rates=rates)
    samples = [
        replace(s, counts=replace(s.counts, reached=s.counts.reached * (np.arange(6) < 3))) for s in samples
    ]  # slot 4 on was never verified
    data = json.loads(json.dumps(jsonable(measure(samples, "MTP (6)", num_resamples=50).to_json()), allow_nan=False))

    def row(metric, group, slot=None):
        place = {"method": "never", "temperature": 0.0, "metric": metric, "group": group, "slot": slot}
        return next(r for r in data["rows"] if place.items() <= r.items())

    undefined = row("conditional", "mean", 6)
    assert (undefined["value"], undefined["low"], undefined["high"]) == (None, None, None)
    assert row("tau", "math")["value"] >= 1
    assert data["interval"] == {"level": 0.95, "resamples": 50, "seed": 0, "unit": "prompt"}
    assert {r["method"] for r in data["rows"] if r["metric"] == MINUS_BASELINE} == {"never"}


def test_without_any_answer_left_everything_is_na(hand_made):
    looping = [replace(s, looped=np.ones(4, bool)) for s in hand_made]
    assert math.isnan(measure(looping, "B", num_resamples=20).get("A", "tau_without_loops").value)
    assert "n/a" in report_text(looping, "B", 20)


def test_refuses(hand_made):
    one, two = hand_made
    with pytest.raises(ValueError, match=r"B and A were measured on different prompts at T = 0 \(4 and 4\)"):
        measure([one, replace(two, prompt_ids=("p", "q", "r", "t"))], "A")
    with pytest.raises(ValueError, match="one entry per prompt"):
        replace(one, groups=("math",))


def test_report_imports_no_torch():
    code = (
        "import sys, hyperdflash.report.figures, hyperdflash.report.tables\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules), 'torch or pyplot'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
