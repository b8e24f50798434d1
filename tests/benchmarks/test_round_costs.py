"""The cost of a round: medians, predicted and measured speedups by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.decoding import cost, cost_blocks, with_speedups
from hyperdflash.report.tables import markdown


def costed(method, batch_size, draft, verify, rest, emitted, first=(0.1, 0.3, 0.2)) -> dict:
    return cost(method, batch_size, np.array([draft, verify, rest]), np.array(emitted), np.array(first))


@pytest.fixture
def measured():
    """AR: 10 ms per token. X: 20 ms per round and once 80, 3 tokens per round."""
    return with_speedups(
        [
            costed("X", 1, [0.004] * 3, [0.015, 0.015, 0.075], [0.001] * 3, [2, 3, 4]),
            costed("AR", 1, [0.0] * 4, [0.008] * 4, [0.002] * 4, [1] * 4),
            costed("X", 4, [0.01] * 2, [0.03] * 2, [0.0] * 2, [10, 6]),
        ]
    )


def test_numbers_by_hand(measured):
    x, ar, alone = measured
    assert [x[name] for name in ("draft_ms", "verify_ms", "rest_ms", "round_ms")] == pytest.approx([4, 15, 1, 20])
    assert (x["tau"], x["first_token_ms"], x["rounds"]) == (3.0, 200.0, 3)
    assert x["predicted"] == pytest.approx(3 * 10 / 20)
    assert x["tokens_per_second"] == pytest.approx(9 / 0.12) and ar["tokens_per_second"] == pytest.approx(100)
    assert x["measured"] == pytest.approx(0.75) and x["ratio"] == pytest.approx(0.5)  # the slow round is in the sum alone
    assert (ar["predicted"], ar["measured"]) == pytest.approx((1, 1))
    assert alone["tau"] == 2.0 and alone["tokens_per_second"] == pytest.approx(200) and alone["predicted"] is None


def test_rows_that_ended_leave_ar_comparable():
    """Half of the rows have ended, so a token costs AR two rounds, and both speedups are 1."""
    ar = costed("AR", 2, [0.0], [0.01], [0.0], [1])
    x = costed("X", 2, [0.01], [0.01], [0.0], [2])
    found = with_speedups([ar, x])[1]
    assert found["predicted"] == pytest.approx(found["measured"]) == pytest.approx(1.0)


def test_table(measured):
    text = markdown(cost_blocks(measured, "a tiny target on 2 cores"))
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ["1", "X", "4.00", "15.0", "1.00", "20.0", "3.00", "200", "75.0", "1.50×", "0.75×", "0.50", "3"]
    assert rows[3][:2] == ["", "AR"] and rows[4][0] == "4"
    assert rows[4][9:12] == ["-", "-", "-"]
    assert "a tiny target on 2 cores" in text and "src.roofline" in text


def test_a_method_without_rounds_is_refused():
    with pytest.raises(ValueError, match="X at batch size 1 has 0 rounds and 3 prefills"):
        costed("X", 1, [], [], [], [])
