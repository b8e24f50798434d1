"""The training objective, Eq. 3: L = L_CE + alpha L_KL, kept as sums until one final division.

1. loss_terms   hidden [B, A, S, D] of one micro-batch on one rank -> LossTerms (sums and counts)
2. +            over micro-batches or ranks: sums and counts add up, so the division can come last
3. total_loss   the only division -> scalar
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import Tensor

from src.contracts import Blocks
from src.loss.cross_entropy import block_cross_entropy
from src.loss.distillation import KLConfig, eq2, kl_distillation, teacher_states

if TYPE_CHECKING:
    from src.target.heads import TargetHeads


@dataclass(frozen=True)
class LossTerms:
    """Sums and counts; adding two LossTerms field by field is the loss terms of both batches together.

    ``ce_sum`` scalar, sum over supervised slots of w_k * CE (with gradient); ``ce_weight`` scalar, the sum of w_k;
    ``kl_sum`` [P] (with gradient) and ``kl_count`` [P], zeros where KL is off;
    for logging: ``slot_ce_sum`` [S] unweighted CE, ``correct`` [S] argmax hits, ``slot_count`` [S] supervised slots.
    """

    ce_sum: Tensor
    ce_weight: Tensor
    kl_sum: Tensor
    kl_count: Tensor
    slot_ce_sum: Tensor
    correct: Tensor
    slot_count: Tensor

    def __add__(self, other: LossTerms) -> LossTerms:
        return LossTerms(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def loss_terms(
    hidden: Tensor, blocks: Blocks, final: Tensor, heads: TargetHeads, *, weights: Tensor, kl: KLConfig
) -> LossTerms:
    """``hidden`` [B, A, S, D] drafted states, ``final`` [B, T, M, D] target residuals, ``weights`` [S].

    Only supervised (anchor, slot) rows reach the LM head; the teacher's logits exist only for slots up to
    ``kl.positions`` and only where ``kl.alpha`` is above 0. Without any row every sum is 0 and still has a gradient.
    """
    num_slots = hidden.shape[2]
    kl.check_slots(num_slots)
    documents, block_ids, slots = blocks.label_mask.nonzero(as_tuple=True)  # R rows each
    logits = heads.logits(hidden[documents, block_ids, slots])  # [R, V]
    labels = blocks.labels[documents, block_ids, slots]
    slot_ce_sum, correct, slot_count = block_cross_entropy(logits, labels, slots, num_slots)

    weights = weights.to(slot_ce_sum)
    if kl.alpha > 0 and kl.positions > 0:
        early = slots < kl.positions
        documents, block_ids, slots = documents[early], block_ids[early], slots[early]
        before = blocks.anchors[documents, block_ids] + slots  # a + k - 1, with slots counted from 0
        teacher = heads.logits(teacher_states(final, documents, before, heads, kl.teacher)).detach()
        kl_sum, kl_count = kl_distillation(logits[early], teacher, slots, kl.positions, kl.temperature)
    else:
        kl_sum, kl_count = slot_ce_sum.new_zeros(kl.positions), slot_count.new_zeros(kl.positions)

    return LossTerms(
        ce_sum=(weights * slot_ce_sum).sum(),
        ce_weight=(weights * slot_count).sum(),
        kl_sum=kl_sum,
        kl_count=kl_count,
        slot_ce_sum=slot_ce_sum.detach(),
        correct=correct,
        slot_count=slot_count,
    )


def total_loss(terms: LossTerms, *, alpha: float, temperature: float) -> Tensor:
    """Eq. 3: weighted mean cross-entropy + alpha times Eq. 2. An empty batch gives 0."""
    nothing = terms.ce_weight == 0
    cross_entropy = terms.ce_sum / terms.ce_weight.masked_fill(nothing, 1.0)
    return cross_entropy + alpha * eq2(terms.kl_sum, terms.kl_count, temperature)
