"""The one definition of what a block may attend to.

Queries of a block see the context strictly before their anchor, and the part of their own block that the layout shows, never
another block. Two masks express this, [B, A, T] for the context and [K, K] for all blocks, instead of one [A * K, T + A * K].
"""

import torch
from torch import Tensor

from hyperdflash.contracts import BlockLayout


def own_mask(layout: BlockLayout, device: torch.device | str) -> Tensor | None:
    """Returns [K, K] bool, True where own-block position i attends to j; None if every position sees the whole block."""
    if layout.visible is None:
        return None
    if layout == BlockLayout.chain(layout.size, "causal"):  # computed on the device, because a copy to it would wait
        return torch.ones(layout.size, layout.size, dtype=torch.bool, device=device).tril()
    return torch.tensor(layout.visible, device=device)


def context_mask(anchors: Tensor, context_positions: Tensor, window: int | None = None) -> Tensor:
    """Returns which context states each block sees: [B, A] anchors, [T] or [B, T] positions of states -> [B, A, T] bool.

    A block sees positions strictly before its anchor: in decoding the anchor is the newest token and has no target state yet.
    Padding of a document lies after every anchor and is never seen. With ``window`` W a block sees only the W newest states, at
    positions a - W to a - 1, so that a decoding loop may drop older ones.
    """
    distance = anchors[..., None] - context_positions[..., None, :]
    return distance > 0 if window is None else (distance > 0) & (distance <= window)
