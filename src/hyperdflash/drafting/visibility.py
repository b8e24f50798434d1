"""The one definition of what a block may attend to.

Queries of a block see the context strictly before their anchor, and their own block in both directions; never another
block. The own-block part needs no mask, so the rule is the context's alone and costs [B, A, T], not [A * K, T + A * K].
"""

from __future__ import annotations

from torch import Tensor


def context_mask(anchors: Tensor, context_positions: Tensor, window: int | None = None) -> Tensor:
    """[B, A] anchors, [T] or [B, T] positions of context states -> [B, A, T] bool.

    Strictly before: at decoding time the anchor is the newest token, and its own target state does not exist yet.
    Padding of a document lies after every anchor, so it is never seen. With ``window`` W a block sees the W newest states
    alone, positions a - W to a - 1, so that a decoding loop may forget the older ones.
    """
    distance = anchors[..., None] - context_positions[..., None, :]
    return distance > 0 if window is None else (distance > 0) & (distance <= window)
