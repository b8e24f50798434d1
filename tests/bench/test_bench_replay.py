from src.bench.replay import forward_products, markdown, measure, replayed
from src.bench.shapes import QUICK, Case


def test_the_products_are_the_forward_ones_of_all_positions():
    case = Case(replayed(QUICK), "fp32", "own")
    found = {p.name: p for p in forward_products(case)}
    assert case.shape.num_anchors == 64 - 7 - 1
    head = found["LM head"]
    assert head.flops == 2 * (56 * 6) * 32 * 512 and head.parts == ("forward",)
    assert "teacher's LM head" not in found


def test_a_toy_document_is_replayed():
    row = measure(QUICK, "fp32", rounds=1, rate_s=0.0)
    assert row["replay_s"] > 0 and row["ratio"] == row["replay_s"] / row["matmul_s"]
    assert "quick" in markdown([row])
