"""The parts of `make engine` that need no engine: V4's CPU kernels in plain torch, and the walk along the engine's rounds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.engine import v4_kernels
from benchmarks.engine.run import accepted, engine_rounds, moves

BLOCK = 4


@pytest.fixture
def cache():
    """Pages of 8 x 4 tokens with rows at slots 3, 4 and 17, and bytes that read as NaN elsewhere."""
    pages = torch.full((8, BLOCK * (576 + 8) + 24), 255, dtype=torch.uint8)
    rows = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 30.0, 1.0])[:, None]
    v4_kernels.insert(pages, torch.tensor([3, 4, 17, -1]), rows, BLOCK)
    return pages, rows[:3]


def test_a_page_gives_back_its_rows_within_fp8(cache):
    pages, rows = cache
    found = v4_kernels.dequantized(pages, torch.tensor([17, 3, 4]), BLOCK)[[1, 2, 0]]
    assert torch.equal(found[:, 448:], rows[:, 448:].bfloat16().float())
    blocks = rows[:, :448].unflatten(1, (7, 64))
    error = (found[:, :448].unflatten(1, (7, 64)) - blocks).abs()
    assert bool((error <= blocks.abs() / 15 + blocks.abs().amax(-1, keepdim=True) / 2**14).all())


def test_attention_weighs_the_seen_rows_and_the_sink(cache):
    pages, _ = cache
    draw = torch.Generator().manual_seed(1)
    query, sink, out = torch.randn(2, 3, 512, generator=draw), torch.tensor([0.5, -1.0, 2.0]), torch.empty(2, 3, 512)
    window, compressed = torch.tensor([[3, 4], [4, -1]]), torch.tensor([[17, -1, -1], [-1, -1, -1]])
    v4_kernels.flash_mla_with_kvcache_cpu(out, query, pages, window, BLOCK, pages, compressed, BLOCK, sink, 0.05)
    for token, slots in enumerate(([3, 4, 17], [4])):
        keys = v4_kernels.dequantized(pages, torch.tensor(slots), BLOCK)
        for head in range(3):
            scores = torch.cat([keys @ query[token, head] * 0.05, sink[head : head + 1]])
            torch.testing.assert_close(out[token, head], scores.softmax(0)[:-1] @ keys)


def test_a_rotation_turns_back():
    rows, at = torch.randn(3, 2, 512), torch.tensor([0, 5, 9])
    angles = torch.randn(10, 32)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    turned = v4_kernels.rotated(rows, at, table)
    assert torch.equal(turned[..., :448], rows[..., :448]) and not torch.allclose(turned, rows)
    torch.testing.assert_close(v4_kernels.rotated(turned, at, table, sign=-1), rows)


def test_the_walk_finds_the_rounds_of_a_text():
    prompt, answer = [9, 9], [1, 2, 3, 4, 5]
    drafts = {2: [2, 3, 7], 5: [5, 6, 6]}  # two accepted, one accepted at the text's end
    given = [
        {"positions": torch.tensor([0, 1]), "states": torch.zeros(2, 6).bfloat16(), "anchor_id": 1, "drafts": drafts[2]},
        {
            "positions": torch.tensor([2, 3, 4, 5]),
            "states": torch.full((4, 6), 1.0).bfloat16(),
            "anchor_id": 4,
            "drafts": drafts[5],
        },
        {
            "positions": torch.tensor([5, 6, 7]),
            "states": torch.full((3, 6), 2.0).bfloat16(),
            "anchor_id": 8,
            "drafts": [0, 0, 0],
        },
    ]
    heads = SimpleNamespace(num_paths=2, hidden_size=3)
    drafted = {"alone": [[(token, {}) for token in answer]], "rounds": [given]}
    ((document, rounds),) = engine_rounds(heads, [prompt], drafted)
    assert rounds == [*drafts.items()]  # the third starts behind the text
    assert document.input_ids[0].tolist() == prompt + answer and document.loss_mask[0].tolist() == [False] * 2 + [True] * 5
    assert document.residual[0, :, 0, 0].tolist() == [0, 0, 1, 1, 1, 2, 2]  # of a position's newest forward
    assert accepted([5, 6, 6], prompt + answer, 5) == 1 and accepted([0], prompt + answer, 6) == 0


def test_texts_part_at_a_tie_where_rounding_moves_a_gap_as_far():
    plain = [(7, {7: -1.0, 8: -2.0, 9: -4.0}), (8, {8: -1.0, 7: -1.25, 9: -4.0}), (7, {7: -1.0, 9: -5.0})]
    drafted = [(7, {7: -1.0, 8: -2.5}), (7, {7: -1.0, 8: -1.125}), (9, {9: -1.0, 8: -2.0})]
    assert moves(plain, drafted) == ([0.5, 0.375], 0.375)
    assert moves(plain, plain) == ([0.0] * 3, None)
    assert moves(plain[2:], drafted[2:]) == ([float("inf")], float("inf"))  # 7 is not among the best of the other run
