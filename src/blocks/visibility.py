"""The one definition of what a block may attend to.

Queries of a block see the context strictly before their anchor, and their own block in both directions; never another
block. The own-block part needs no mask, so the rule is the context's alone and costs [B, A, T], not [A * K, T + A * K].
"""

from __future__ import annotations

from torch import Tensor


def context_mask(anchors: Tensor, context_positions: Tensor) -> Tensor:
    """[B, A] anchors, [T] or [B, T] positions of context states -> [B, A, T] bool.

    Strictly before: at decoding time the anchor is the newest token, and its own target state does not exist yet.
    Padding of a document lies after every anchor, so it is never seen.
    """
    return context_positions[..., None, :] < anchors[..., None]
