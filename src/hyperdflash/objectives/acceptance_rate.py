"""Losses of the acceptance rate, alpha = sum_v min(p_v, q_v) at temperature 1, of the target's p and the drafter's q. tv 1 -
alpha total variation, the rejection rate; DSpark's L1 is twice it nla -log alpha its gradient is tv's times 1 / alpha lk_hybrid
lambda KL(p || q) + (1 - lambda) tv lambda = exp(-eta alpha), detached (arXiv 2602.23881)"""

from dataclasses import dataclass

from torch import Tensor

from hyperdflash.objectives.distillation import TEACHERS
from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.objectives.term import Reading, SlotBatch, SlotWeighted
from hyperdflash.settings import one_of, positive_number

SMALLEST_RATE = 1e-5  # of -log alpha, as speculators 0.9.0 has it


@dataclass(frozen=True, kw_only=True)
class TotalVariation(SlotWeighted):
    """``teacher`` hc_head is the target's exact distribution."""

    teacher: str = "hc_head"

    name = "tv"

    def __post_init__(self):
        super().__post_init__()
        one_of(f"objective.terms.{self.name}.teacher", self.teacher, TEACHERS)

    @property
    def reading(self) -> Reading:
        return Reading(self.teacher, overlap=True)

    def rate(self, batch: SlotBatch) -> Tensor:
        """Returns alpha of every row, [R]."""
        overlap = batch.divergences(self.reading).overlap
        assert overlap is not None, "a reading of the overlap has one"
        return overlap

    def of_rows(self, logits: FactoredLogits, batch: SlotBatch) -> Tensor:
        return 1 - self.rate(batch)


@dataclass(frozen=True, kw_only=True)
class LogAcceptance(TotalVariation):
    name = "nla"

    def of_rows(self, logits: FactoredLogits, batch: SlotBatch) -> Tensor:
        return -self.rate(batch).clamp(min=SMALLEST_RATE).log()


@dataclass(frozen=True, kw_only=True)
class LKHybrid(TotalVariation):
    eta: float = 3.0

    name = "lk_hybrid"

    def __post_init__(self):
        super().__post_init__()
        positive_number("objective.terms.lk_hybrid.eta", self.eta)

    @property
    def reading(self) -> Reading:
        return Reading(self.teacher, kl=True, overlap=True)

    def of_rows(self, logits: FactoredLogits, batch: SlotBatch) -> Tensor:
        kl, rate = batch.divergences(self.reading).kl, self.rate(batch)
        share = (-self.eta * rate.detach()).exp()
        return share * kl + (1 - share) * (1 - rate)
