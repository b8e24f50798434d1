"""Position-weighted cross-entropy of draft slots against the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.objectives.term import SlotBatch, SumCount, Term
from hyperdflash.settings import number_between, positive_number


@dataclass(frozen=True, kw_only=True)
class PositionWeighted(Term):
    """sum w_k CE / sum w_k over supervised slots; ``gamma`` as in ``position_weights``, null weighs every slot equally."""

    gamma: float | None
    weight: float = 1.0

    name = "cross_entropy"

    def __post_init__(self):
        if self.gamma is not None:
            positive_number("loss.gamma", self.gamma)
        number_between("loss.weight", self.weight, 0.0, float("inf"))

    def count(self, slot_count: Tensor) -> Tensor:
        return (position_weights(len(slot_count), self.gamma, slot_count.device) * slot_count).sum()

    def __call__(self, logits: FactoredLogits, batch: SlotBatch) -> SumCount:
        of_slot = batch.per_slot(batch.values.cross_entropy)
        weights = position_weights(len(of_slot), self.gamma, of_slot.device)
        return SumCount((weights.to(of_slot) * of_slot).sum(), self.count(batch.slot_count))


def position_weights(num_slots: int, gamma: float | None, device: torch.device | str = "cpu") -> Tensor:
    """Returns w_k = exp(-(k - 1) / gamma) for k = 1..S, [S] fp32 (DFlash): an early miss discards every later slot."""
    if gamma is None:
        return torch.ones(num_slots, device=device)
    return torch.exp(-torch.arange(num_slots, device=device) / gamma)
