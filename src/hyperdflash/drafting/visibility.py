"""The one definition of what a block may attend to.

Queries of a block see the context strictly before their anchor, and of their own block what its layout shows; never another
block. So the rule is two masks, the context's [B, A, T] and one [K, K] for all blocks, not one [A * K, T + A * K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperdflash.contracts import BlockLayout


def own_mask(layout: BlockLayout, device: torch.device | str) -> Tensor | None:
    """[K, K] bool, True where own-block position i attends to j; None where every position sees the whole block."""
    if layout.visible is None:
        return None
    if layout == BlockLayout.chain(layout.size, "causal"):  # made on the device: a copy would wait for it
        return torch.ones(layout.size, layout.size, dtype=torch.bool, device=device).tril()
    return torch.tensor(layout.visible, device=device)


def context_mask(anchors: Tensor, context_positions: Tensor, window: int | None = None) -> Tensor:
    """[B, A] anchors, [T] or [B, T] positions of context states -> [B, A, T] bool.

    Strictly before: at decoding time the anchor is the newest token, and its own target state does not exist yet.
    Padding of a document lies after every anchor, so it is never seen. With ``window`` W a block sees the W newest states
    alone, positions a - W to a - 1, so that a decoding loop may forget the older ones.
    """
    distance = anchors[..., None] - context_positions[..., None, :]
    return distance > 0 if window is None else (distance > 0) & (distance <= window)
