"""Trains a draft head's confidence towards the acceptance rate of its drafts by cross-entropy (DSpark, arXiv 2607.05147)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hyperdflash.objectives.cross_entropy import position_weights
from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.objectives.term import Reading, SlotBatch, SumCount, Term
from hyperdflash.settings import number_between, positive_number


@dataclass(frozen=True, kw_only=True)
class Confidence(Term):
    """sum w_k BCE(c_k, alpha_k) / sum w_k over supervised slots; alpha_k = sum_v min(p_v, q_v) at temperature 1 is detached.

    ``gamma`` is that of w_k = exp(-(k - 1) / gamma); null weighs every slot equally. The draft head must have a confidence.
    """

    weight: float = 1.0
    gamma: float | None = 4.0

    name = "confidence"

    def __post_init__(self):
        number_between("objective.terms.confidence.weight", self.weight, 0.0, float("inf"))
        if self.gamma is not None:
            positive_number("objective.terms.confidence.gamma", self.gamma)

    @property
    def reading(self) -> Reading:
        return Reading("hc_head", overlap=True)

    def check(self, num_slots: int, has_confidence: bool) -> None:
        if not has_confidence:
            raise ValueError(
                "objective.terms.confidence needs a draft head that has a confidence, and this one has none: run with "
                "head=markov_confidence, or without that term"
            )

    def count(self, slot_count: Tensor) -> Tensor:
        return position_weights(len(slot_count), self.gamma, slot_count.device) * slot_count

    def __call__(self, logits: FactoredLogits, batch: SlotBatch) -> SumCount:
        accepted = batch.divergences(self.reading).overlap.detach().clamp(0, 1)
        bce = F.binary_cross_entropy_with_logits(logits.confidence.to(accepted), accepted, reduction="none")
        of_slot = batch.per_slot(bce)
        weights = position_weights(len(of_slot), self.gamma, of_slot.device)
        return SumCount(weights.to(of_slot) * of_slot, self.count(batch.slot_count))
