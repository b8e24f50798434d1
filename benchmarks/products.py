"""Lists the matrix products that drafting cannot do without, their floating-point operations, and their rates on this machine.

The count has what the result needs, not what an implementation does: only context that an anchor sees, only drafted slots at
the LM head. Its formula is that of the forward products in drafting/flops.py; here each product stands alone, to be timed.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from benchmarks.result import seconds
from benchmarks.shapes import StepShape
from hyperdflash.numerics import fast_fp32_products

MOST_LOGITS = 64_000_000  # outputs of a timed product with the vocabulary; they determine its rows


@dataclass(frozen=True)
class Product:
    """[batch, rows, inner] x [batch, inner, columns]; ``flops`` of all such products, which for attention to context is less
    than the sizes say."""

    name: str
    rows: int
    inner: int
    columns: int
    batch: int
    flops: int


def products(shape: StepShape) -> list[Product]:
    """Returns the forward products of drafting from every anchor of ``shape``."""
    tokens, layers, width, inner = shape.num_seen, shape.num_layers, shape.hidden_size, shape.intermediate_size
    anchors, size, heads, head = shape.num_anchors, shape.block_size, shape.num_heads, shape.head_dim
    queries = anchors * size

    def dense(name: str, rows: int, inputs: int, outputs: int, times: int = 1) -> Product:
        return Product(name, rows, inputs, outputs, 1, 2 * rows * inputs * outputs * times)

    def attention(name: str, rows: int, inputs: int, outputs: int, pairs: int, batch: int) -> Product:
        return Product(name, rows, inputs, outputs, batch, 2 * pairs * heads * head * layers)

    seen, own = size * shape.anchor_sum, queries * size  # pairs of a query and a context state, and of two of a block
    return [
        dense("context, streams to D", tokens, shape.num_streams * width, width),
        dense("context, keys and values", tokens, width, width, 2 * layers),
        dense("blocks, q k v o", queries, width, width, 4 * layers),
        dense("blocks, MLP in", queries, width, inner, 2 * layers),
        dense("blocks, MLP out", queries, inner, width, layers),
        attention("context scores", queries, head, tokens, seen, heads),
        attention("context values", queries, tokens, head, seen, heads),
        attention("block scores", size, head, size, own, heads * anchors),
        attention("block values", size, size, head, own, heads * anchors),
        dense("LM head", shape.drafted, width, shape.vocab_size),
    ]


def rate(product: Product, dtype: torch.dtype, least_s: float) -> float:
    """Returns the FLOP/s of one product [rows, inner] x [columns, inner]^T, the best of at least 3 repetitions and ``least_s``;
    in fp32 the faster of torch's two libraries (MKL and oneDNN)."""
    batch, rows, columns = product.batch, product.rows, product.columns
    if rows * columns * batch > MOST_LOGITS and batch == 1:
        rows = max(1, MOST_LOGITS // columns)
    left, right = torch.randn(batch, rows, product.inner).to(dtype), torch.randn(batch, columns, product.inner).to(dtype).mT
    output = torch.empty(batch, rows, columns, dtype=dtype)
    if batch == 1:
        left, right, output = left[0], right[0], output[0]
    best = float("inf")
    for route in (nullcontext, fast_fp32_products) if dtype == torch.float32 else (nullcontext,):
        with route():
            torch.matmul(left, right, out=output)
            repetitions, ends = 0, time.perf_counter() + least_s
            while repetitions < 3 or time.perf_counter() < ends:
                best = min(best, seconds(lambda: torch.matmul(left, right, out=output)))
                repetitions += 1
    return 2 * batch * rows * product.inner * columns / best
