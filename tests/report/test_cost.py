"""The cost of a round: medians, predicted and measured speedups by hand."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from hyperdflash.planning.cost import RoundTimes, cost_markdown, costs, write_cost_report


def times(method, batch_size, draft, verify, rest, emitted, first=(0.1, 0.3, 0.2)) -> RoundTimes:
    return RoundTimes(method, batch_size, *map(np.array, (draft, verify, rest, emitted, first)))


@pytest.fixture
def measured():
    """AR: 10 ms per token. X: 20 ms per round and once 80, 3 tokens per round."""
    return [
        times("X", 1, [0.004] * 3, [0.015, 0.015, 0.075], [0.001] * 3, [2, 3, 4]),
        times("AR", 1, [0.0] * 4, [0.008] * 4, [0.002] * 4, [1] * 4),
        times("X", 4, [0.01] * 2, [0.03] * 2, [0.0] * 2, [10, 6]),
    ]


def test_numbers_by_hand(measured):
    x, ar, alone = costs(measured)
    assert (x.draft_ms, x.verify_ms, x.rest_ms, x.round_ms) == pytest.approx((4, 15, 1, 20))
    assert (x.tau, x.first_token_ms, x.rounds) == (3.0, 200.0, 3)
    assert x.predicted == pytest.approx(3 * 10 / 20)
    assert x.tokens_per_second == pytest.approx(9 / 0.12) and ar.tokens_per_second == pytest.approx(100)
    assert x.measured == pytest.approx(0.75) and x.ratio == pytest.approx(0.5)  # the slow round is in the sum alone
    assert (ar.predicted, ar.measured) == pytest.approx((1, 1))
    assert alone.tau == 2.0 and alone.tokens_per_second == pytest.approx(200) and math.isnan(alone.predicted)


def test_rows_that_ended_leave_ar_comparable():
    """Half of the rows have ended, so a token costs AR two rounds, and both speedups are 1."""
    ar = times("AR", 2, [0.0], [0.01], [0.0], [1])
    x = times("X", 2, [0.01], [0.01], [0.0], [2])
    assert costs([ar, x])[1].predicted == pytest.approx(costs([ar, x])[1].measured) == pytest.approx(1.0)


def test_table(measured):
    text = cost_markdown(costs(measured), "a tiny target on 2 cores")
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ["1", "X", "4.00", "15.0", "1.00", "20.0", "3.00", "200", "75.0", "1.50×", "0.75×", "0.50", "3"]
    assert rows[3][:2] == ["", "AR"] and rows[4][0] == "4"
    assert rows[4][9:12] == ["-", "-", "-"]
    assert "a tiny target on 2 cores" in text and "src.roofline" in text


def test_csv_and_json(measured, tmp_path):
    write_cost_report(measured, tmp_path, "s")
    rows = list(csv.DictReader((tmp_path / "cost.csv").read_text().splitlines()))
    assert (rows[0]["verify_ms"], rows[0]["ratio"], rows[2]["measured"]) == ("15.000000", "0.500000", "")
    data = json.loads((tmp_path / "cost.json").read_text())
    assert data["costs"][2]["predicted"] is None and data["costs"][0]["tau"] == 3.0 and data["setting"] == "s"


def test_report(measured, tmp_path):
    written = write_cost_report(measured, tmp_path / "out", "a tiny target")
    assert [path.name for path in written] == ["cost.md", "cost.csv", "cost.json", "cost.png"]
    assert written[-1].read_bytes()[:4] == b"\x89PNG" and written[-1].stat().st_size > 10_000


def test_refuses(measured):
    with pytest.raises(ValueError, match="X at batch size 1 was given more than once"):
        costs([*measured, measured[0]])
    with pytest.raises(ValueError, match="no round times"):
        costs([])
    with pytest.raises(ValueError, match="each needs one entry per round"):
        times("X", 1, [0.1], [0.1, 0.2], [0.1], [1])
    with pytest.raises(ValueError, match="0 rounds and 3 prefills"):
        times("X", 1, [], [], [], [])
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        times("X", 0, [0.1], [0.1], [0.1], [1])
