"""Total variation between drafter and target: TV = 1 - sum_v min(p_v, q_v), one minus the acceptance rate of a draft."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hyperdflash.objectives.cross_entropy import position_weights
from hyperdflash.objectives.distillation import TEACHERS
from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.objectives.term import Reading, SlotBatch, SumCount, Term
from hyperdflash.settings import number_between, one_of, positive_number


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Term):
    """sum w_k TV / sum w_k over supervised slots, at temperature 1; ``gamma`` as in ``position_weights``.

    ``teacher`` hc_head is the target's exact distribution, and TV is then the rejection rate of sampling at temperature 1.
    DSpark's L1 loss (arXiv 2607.05147) is twice TV.
    """

    weight: float
    gamma: float | None = None
    teacher: str = "hc_head"

    name = "tv"

    def __post_init__(self):
        number_between("objective.terms.tv.weight", self.weight, 0.0, float("inf"))
        if self.gamma is not None:
            positive_number("objective.terms.tv.gamma", self.gamma)
        one_of("objective.terms.tv.teacher", self.teacher, TEACHERS)

    @property
    def reading(self) -> Reading:
        return Reading(self.teacher, overlap=True)

    def count(self, slot_count: Tensor) -> Tensor:
        return position_weights(len(slot_count), self.gamma, slot_count.device) * slot_count

    def __call__(self, logits: FactoredLogits, batch: SlotBatch) -> SumCount:
        of_slot = batch.per_slot(1 - batch.divergences(self.reading).overlap)
        weights = position_weights(len(of_slot), self.gamma, of_slot.device)
        return SumCount(weights.to(of_slot) * of_slot, self.count(batch.slot_count))
