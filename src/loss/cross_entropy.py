"""Cross-entropy of the draft slots with position weights, as sums over rows.

A row is one supervised (anchor, slot). R rows, each with its slot 0..S-1 (slot index 0 is the paper's k = 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from src.settings import positive_number


@dataclass(frozen=True, kw_only=True)
class PositionWeighted:
    """``gamma`` of w_k = exp(-(k - 1) / gamma); null weighs every slot alike."""

    gamma: float | None

    def __post_init__(self):
        if self.gamma is not None:
            positive_number("loss.gamma", self.gamma)

    def weights(self, num_slots: int) -> Tensor:
        """[S] fp32."""
        return position_weights(num_slots, self.gamma)


def position_weights(num_slots: int, gamma: float | None) -> Tensor:
    """w_k = exp(-(k - 1) / gamma) for k = 1..S, [S] fp32: an early miss throws away everything after it (DFlash)."""
    if gamma is None:
        return torch.ones(num_slots)
    return torch.exp(-torch.arange(num_slots) / gamma)


def block_cross_entropy(logits: Tensor, labels: Tensor, slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """``logits`` [R, V], ``labels`` and ``slots`` [R] int64 -> per slot: CE sum [S], correct [S], rows [S].

    Cross-entropy in nats and fp32; ``correct`` and rows are int64 counts. Weights are applied to these sums afterwards,
    since a slot's weight is the same in every row.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")  # [R]
    hits = (logits.detach().argmax(dim=-1) == labels).long()
    ce_sum = losses.new_zeros(num_slots).index_add(0, slots, losses)
    correct = labels.new_zeros(num_slots).index_add(0, slots, hits)
    count = labels.new_zeros(num_slots).index_add(0, slots, torch.ones_like(hits))
    return ce_sum, correct, count
