"""KL distillation of the first P slots from the target's LM head (paper, section 2.3, Eq. 2). Slot k predicts x[a + k]. The
target predicts the same token from H[a + k - 1], which is therefore slot k's teacher."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.objectives.term import Reading, SlotBatch, SumCount, Term
from hyperdflash.settings import natural_int, number_between, one_of, positive_number
from hyperdflash.targets.heads import TargetHeads

TEACHERS = ("mean_pool", "hc_head")


@dataclass(frozen=True, kw_only=True)
class Distillation(Term):
    """``alpha`` of Eq. 3, ``positions`` P (None: all slots), ``temperature`` T_KD; ``teacher`` says how the target's paths
    collapse. mean_pool is the paper's teacher, hc_head the target's exact distribution. With alpha 0 nothing is computed."""

    alpha: float
    positions: int | None
    temperature: float
    teacher: str

    name = "kl"

    def __post_init__(self):
        number_between("kl.alpha", self.alpha, 0.0, 1.0)
        if self.positions is not None:
            natural_int("kl.positions", self.positions)
        positive_number("kl.temperature", self.temperature)
        one_of("kl.teacher", self.teacher, TEACHERS)
        if self.alpha > 0 and self.positions == 0:
            warnings.warn(f"kl.alpha={self.alpha} has no effect: kl.positions is 0", stacklevel=2)

    @property
    def weight(self) -> float:
        return self.alpha

    @property
    def reading(self) -> Reading:
        return Reading(self.teacher, self.temperature, self.positions, kl=True)

    def check(self, num_slots: int, has_confidence: bool = False) -> None:
        if self.positions is not None and self.positions > num_slots:
            raise ValueError(f"kl.positions must be in 0..{num_slots} (drafter.block_size - 1), got {self.positions}")

    def count(self, slot_count: Tensor) -> Tensor:
        return slot_count[: self.positions]

    def __call__(self, logits: FactoredLogits, batch: SlotBatch) -> SumCount:
        kl = batch.per_slot(batch.divergences(self.reading).kl)
        return SumCount(kl[: self.positions], self.count(batch.slot_count))

    def mean(self, total: SumCount) -> Tensor:
        return kl_loss(total.sum, total.count, self.temperature)


@torch.no_grad()
def teacher_states(residual: Tensor, documents: Tensor, positions: Tensor, heads: TargetHeads, teacher: str) -> Tensor:
    """Returns what the LM head reads at ``residual[documents, positions]``: [B, T, M, D], two [...] index tensors -> [..., D].
    Slot k's teacher stands at position a + k - 1."""
    rows = residual[documents, positions]  # [..., M, D]
    batch = rows.reshape(1, rows.shape[:-2].numel(), *rows.shape[-2:])  # hc_head takes [B, T, M, D] only
    return heads.collapse(batch, teacher).reshape(*rows.shape[:-2], rows.shape[-1])


def kl_loss(kl_sum: Tensor, kl_count: Tensor, temperature: float) -> Tensor:
    """Eq. 2: T^2 / P * sum_k kl_sum_k / kl_count_k, with P = len(kl_sum), [P] twice -> scalar. A slot without rows adds 0."""
    if len(kl_sum) == 0:
        return kl_sum.sum()
    return temperature**2 / len(kl_sum) * (kl_sum / kl_count.clamp(min=1)).sum()
