"""The planner's memory model beside a real step: the comparison itself."""

from __future__ import annotations

from benchmarks.duel import Terms
from benchmarks.shapes import QUICK, SHAPES, Case
from benchmarks.step_memory import blocks, measure, predicted


def test_a_real_step_stands_beside_the_model():
    record = measure([SHAPES[0]], Terms(rounds=1, warm_up=0), ["fp32"])
    (row,), (table,) = record["rows"], blocks(record)
    model = sum(predicted(Case(SHAPES[0], "fp32", "own")).values())
    assert 0.6 < model / row["measured"] < 1.6  # the libraries' own buffers differ between machines
    assert table.rows[0][-1] == f"{model / row['measured']:.2f}"


def test_the_model_of_a_worker_has_no_optimizer_and_its_tables_in_bf16():
    fp32, bf16 = (predicted(Case(QUICK, dtype, "own")) for dtype in ("fp32", "bf16"))
    assert fp32["optimizer"] == 0 and fp32["weights"] == fp32["gradients"] == 2 * bf16["weights"]
    assert fp32["heads"] == bf16["heads"] == 2 * QUICK.vocab_size * QUICK.hidden_size * 2
