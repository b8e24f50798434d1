"""Trains a draft head's confidence towards the acceptance rate of its drafts by cross-entropy (DSpark, arXiv 2607.05147)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.objectives.term import Reading, SlotBatch, SlotWeighted


@dataclass(frozen=True, kw_only=True)
class Confidence(SlotWeighted):
    """BCE(c_k, alpha_k) per slot, for a head with confidence; alpha_k = sum_v min(p_v, q_v) at temperature 1 is detached."""

    gamma: float | None = 4.0

    name = "confidence"

    @property
    def reading(self) -> Reading:
        return Reading("hc_head", overlap=True)

    def check(self, num_slots: int, has_confidence: bool) -> None:
        if not has_confidence:
            raise ValueError(
                "objective.terms.confidence needs a draft head that has a confidence, and this one has none: run with "
                "head=markov_confidence, or without that term"
            )

    def of_rows(self, logits: FactoredLogits, batch: SlotBatch) -> Tensor:
        accepted = batch.divergences(self.reading).overlap.detach().clamp(0, 1)
        return F.binary_cross_entropy_with_logits(logits.confidence.to(accepted), accepted, reduction="none")
