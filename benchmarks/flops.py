"""Matrix products that a training step cannot do without, and their floating-point operations. Standard library only.

The count has what the result needs, not what an implementation does: only context that an anchor sees, only supervised slots
at the LM head, nothing computed again for the backward pass, no gradient of frozen weights. The sum equals that of
drafting/flops.py; this module lists every product, so that it can be timed.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import Case

FORMULA = """\
FLOPs of a step, 2 for a multiplication with its addition, all in one document:

    context, streams to width D   2 * T' * M D * D          x 2  (forward, weight gradient; the states are frozen)
    context, keys and values      2 * T' * D * 2D * layers  x 3  (forward, input gradient, weight gradient)
    blocks, q k v o               2 * A K * D * 4D * layers x 3
    blocks, gated MLP             2 * A K * D * 3I * layers x 3
    attention to context          2 * 2 * K * D * sum(a) * layers x 3  (an anchor a sees a states; scores, then values)
    attention within a block      2 * 2 * A K * K * D * layers    x 3
    LM head                       2 * A S * D * V           x 2  (forward, input gradient; the head is frozen)
    teacher's LM head             2 * A P * D * V           x 1

A anchors a among T tokens; as expected of them, sum(a) = A (T - K) / 2 and T' = (T - K) A / (A + 1), states before the last
one; K slots of a block, of which S = K - 1 are supervised and P have a teacher; D width, I that of the MLP, M streams, V
vocabulary."""

PARTS = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True)
class Product:
    """[batch, rows, inner] x [batch, inner, columns], with those gradients that ``parts`` names; ``flops`` of all parts in
    a whole step, which for attention to context is less than the sizes say."""

    name: str
    rows: int
    inner: int
    columns: int
    batch: int
    parts: tuple[str, ...]
    flops: int


def products(case: Case) -> list[Product]:
    """Of this project's side of a case; at the peer's, the teacher's LM head reads other rows."""
    shape, taught = case.shape, num_taught(case)
    tokens, layers, width, inner = shape.num_seen, shape.num_layers, shape.hidden_size, shape.intermediate_size
    anchors, heads, head = shape.num_anchors, shape.num_heads, shape.head_dim
    queries, seen = anchors * shape.block_size, shape.block_size * shape.anchor_sum  # (query, context state) pairs

    def dense(name: str, rows: int, inputs: int, outputs: int, times: int, parts: tuple[str, ...] = PARTS) -> Product:
        return Product(name, rows, inputs, outputs, 1, parts, 2 * rows * inputs * outputs * times * len(parts))

    def attention(name: str, rows: int, inputs: int, outputs: int, pairs: int, batch: int) -> Product:
        return Product(name, rows, inputs, outputs, batch, PARTS, 2 * pairs * heads * head * layers * len(PARTS))

    whole = [
        dense("context, streams to D", tokens, shape.num_streams * width, width, 1, ("forward", "weight gradient")),
        dense("context, keys and values", tokens, width, width, 2 * layers),
        dense("blocks, q k v o", queries, width, width, 4 * layers),
        dense("blocks, MLP in", queries, width, inner, 2 * layers),
        dense("blocks, MLP out", queries, inner, width, layers),
        attention("context scores", queries, head, tokens, seen, heads),
        attention("context values", queries, tokens, head, seen, heads),
        attention("block scores", shape.block_size, head, shape.block_size, queries * shape.block_size, heads * anchors),
        attention("block values", shape.block_size, shape.block_size, head, queries * shape.block_size, heads * anchors),
        dense("LM head", shape.drafted, width, shape.vocab_size, 1, ("forward", "input gradient")),
    ]
    return [*whole, dense("teacher's LM head", anchors * taught, width, shape.vocab_size, 1, ("forward",))]


def num_taught(case: Case) -> int:
    """P: slots with a KL term on this project's side."""
    return case.shape.num_slots if case.objective == "kl" else 2


def step_flops(case: Case) -> int:
    return sum(product.flops for product in products(case))
