"""The parts of `make engine` that need no engine: V4's CPU kernels in plain torch, and the walk along the engine's rounds."""

from __future__ import annotations

import pytest
import torch

from benchmarks.engine import v4_kernels
from benchmarks.engine.run import accepted, next_anchor

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


def test_the_walk_finds_the_anchor_of_each_round():
    text = [9, 9, 1, 2, 3, 4, 5]
    assert accepted([2, 3, 7], text, 2) == 2 and accepted([5], text, 6) == 0 and accepted([5, 6], text, 5) == 1
    assert next_anchor([2], [2, 3, 7], text) == 5 and next_anchor([2, 5], [0], text) == 6
