"""Floating-point operations of one training step's matrix products: the lower bound for a measured step.

A product of [n, k] and [k, m] takes 2 n k m operations. The backward pass takes one more product per factor that has a
gradient; the target's states, embedding and LM head are frozen. With T tokens and A blocks in all documents, C context states
that an anchor sees on average, F = D' * (2 H E + 2 N E + 3 I) weights per layer, of which D' * 2 N E give keys and values, and
the other names as in contracts.py and drafting/attention.py, the counts are, times 2:

    reducer     2 T (weights)                                    forward, weights
    context     3 L T D' 2 N E                                   forward, weights, inputs
    blocks      3 L A K F  (+ 2 A K D D' + 3 A S D' D, where D' is not the target's D)
    attention   3 L A K H E 2 (C + K)                            scores and weighted values, both factors trained
    lm_head     2 A S V D + A P V D                              forward and inputs; the teacher's forward

Recomputed products count once, and rows that the loss masks do not count.
"""

from dataclasses import astuple, dataclass

from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.layers import CHANNELS


@dataclass(frozen=True)
class StepFlops:
    reducer: float
    context: float
    blocks: float
    attention: float
    lm_head: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def step_flops(
    config: DrafterConfig,
    *,
    target_width: int,
    vocab_size: int,
    num_tokens: int,
    num_anchors: int,
    num_taught: int,
    reducer_weights: int,
    mean_visible: float | None = None,
) -> StepFlops:
    """Counts one step with every slot supervised; sizes as above. ``num_taught`` is P (0 without KL), ``reducer_weights`` the
    number of weights in the reducer (fc: streams * D * D'; hc_gate: M * M * D), ``mean_visible`` is C, by default T / 2."""
    hidden = config.hidden_size or target_width
    layers, rows, slots = config.num_layers, num_anchors * config.block_size, num_anchors * config.num_slots
    heads, keys = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    seen = (num_tokens / 2 if mean_visible is None else mean_visible) + config.block_size
    convolution = 4 * config.convolution * hidden // CHANNELS  # their kernels
    blocks = 3 * layers * rows * hidden * (2 * heads + keys + 3 * config.intermediate_size + convolution)
    if hidden != target_width:
        blocks += (2 * rows + 3 * slots) * hidden * target_width
    return StepFlops(
        reducer=2 * 2 * num_tokens * reducer_weights,
        context=2 * 3 * layers * num_tokens * hidden * keys,
        blocks=2 * blocks,
        attention=2 * 3 * layers * rows * heads * 2 * seen,
        lm_head=2 * (2 * slots + num_anchors * num_taught) * vocab_size * target_width,
    )
