"""Counts the bytes of one training step on one rank, from sizes alone.

Legend: contracts.py; D' the drafter's width, H heads and N key-value heads of width E, I of the MLP, R = B A K block
rows, C = B T context rows. Bytes per element: w of weights, a of activations between layers, c of a product's inputs, s of
cached states, h of the frozen heads. Under autocast w = a = 4 and c = 2, and every product rounds its input to c.

    weights       P (w + w gradient + optimizer); autocast keeps each matrix in c as well
    heads         2 V D h                                            embedding and LM head, frozen
    states        C D s per stored stream                            of the batch at hand and of the next one
    context       2 C D' a                                           the reducer's output and its norm, for all layers
    a layer       6 C N E c + 6 R D' a + R (7 H E + 8 N E + 2 I) c   kept for the backward pass
      autocast    2 C D' c + R (5 D' + H E) c                        more
      checkpoints R D' a instead, and one layer whole
    backward      C (6 N E 4 + 3 D' a) + R (2 I c + 4 D' 4)   one layer at a time: gradients on their way, norms in fp32
    vocabulary    logits of some rows in slices; of all rows: states, expected rows of the LM head, both losses' gradients

Compared with measured peaks by `python -m benchmarks.step_memory`.
"""

from dataclasses import dataclass

from hyperdflash.drafting.config import DrafterConfig


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """One step of one rank: ``tokens`` T of the longest document (padding counts), ``anchors`` A per document, ``tapped``
    states of width D per token (M, and M more per layer tap), and the bytes per element that the module lists."""

    documents: int
    tokens: int
    anchors: int
    vocab_size: int
    target_width: int
    num_paths: int
    tapped: int
    trainable: int
    num_taught: int
    optimizer_bytes: int = 8  # AdamW: two fp32 moments per weight
    weight_bytes: int = 4
    flow_bytes: int = 4
    compute_bytes: int = 2
    state_bytes: int = 2
    head_bytes: int = 2
    batches_held: int = 2
    loss_states: int = 4096  # objectives/sweep.py, ROWS and SLICE_BYTES on CUDA
    loss_slice_bytes: int = 256 << 20
    runtime_bytes: int = 1 << 30  # CUDA's context, libraries' workspaces, communication buffers: an assumption
    gate_tokens: int = 1024  # drafting/reducers/hc_gate.py, TOKENS


def step_memory(config: DrafterConfig, sizes: StepSizes) -> dict[str, float]:
    """Returns bytes by part: what lives at the end of the forward pass, and the larger temporaries of loss and backward."""
    s = sizes
    width = config.hidden_size or s.target_width
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    a, c = s.flow_bytes, s.compute_bytes
    rounded = c if a != c else 0  # autocast: each product's input once more
    context, rows = s.documents * s.tokens, s.documents * s.anchors * config.block_size
    of_context = context * (6 * keys * c + 2 * width * rounded)
    of_blocks = rows * (6 * width * a + (7 * heads + 8 * keys + 2 * config.intermediate_size) * c)
    of_blocks += rows * (5 * width + heads) * rounded
    layers = config.num_layers * (of_context + of_blocks)
    if config.gradient_checkpointing:
        layers = config.num_layers * (of_context + rows * width * a) + of_blocks
    slots = s.documents * s.anchors * config.num_slots
    taught = s.documents * s.anchors * s.num_taught
    together = max(1, min(s.loss_states, slots + taught))
    per_slice = min(s.loss_slice_bytes, 4 * together * s.vocab_size)
    vocabulary = 2 * per_slice + (slots + taught) * s.target_width * (4 + 2 * c + a)
    if s.head_bytes < c:
        vocabulary += per_slice / (4 * together) * s.target_width * c
    gate = min(s.tokens, s.gate_tokens) * s.documents * s.num_paths * s.target_width * 4 * 3
    return {
        "weights": s.trainable * (s.weight_bytes + rounded),
        "gradients": s.trainable * s.weight_bytes,
        "optimizer": s.trainable * s.optimizer_bytes,
        "heads": 2 * s.vocab_size * s.target_width * s.head_bytes,
        "states": s.batches_held * context * (s.tapped * s.target_width * s.state_bytes + 9),
        "context": context * width * (2 * a + rounded) + gate,
        "layers": layers,
        "backward": context * (24 * keys + 3 * width * a) + rows * (2 * config.intermediate_size * c + 16 * width),
        "vocabulary": vocabulary,
        "runtime": s.runtime_bytes,
    }
