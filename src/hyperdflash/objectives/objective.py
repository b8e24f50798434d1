"""The training objective, Eq. 3: L = L_CE + alpha L_KL, kept as sums until one final division.

1. loss_counts  masks of one micro-batch on one rank -> LossCounts, before any forward pass
2. loss_terms   hidden [B, A, S, D] of it -> LossTerms (sums with gradients, and the same counts)
3. +            over micro-batches or ranks: sums and counts add up, so the division can come last
4. total_loss   the only division -> scalar. Where a step has several micro-batches or ranks, each divides its own sums by
                the counts of all of them, and the gradients add up to those of the whole
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdflash.contracts import Blocks
from hyperdflash.objectives.distillation import KLConfig, eq2, teacher_states
from hyperdflash.objectives.vocabulary import ROUND, row_losses

if TYPE_CHECKING:
    from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True)
class LossCounts:
    """What the sums are divided by; known from the masks alone. Adding two is the counts of both batches together.

    ``ce_weight`` scalar, the sum of w_k over supervised slots; ``kl_count`` [P] int64, zeros where KL is off;
    ``slot_count`` [S] int64 supervised slots.
    """

    ce_weight: Tensor
    kl_count: Tensor
    slot_count: Tensor

    def __add__(self, other: Self) -> Self:
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class LossTerms(LossCounts):
    """Sums beside their counts; adding two is the loss terms of both batches together.

    ``ce_sum`` scalar, sum over supervised slots of w_k * CE, and ``kl_sum`` [P], both with gradients;
    for logging: ``slot_ce_sum`` [S] unweighted CE, ``correct`` [S] int64 labels with the largest logit.
    """

    ce_sum: Tensor
    kl_sum: Tensor
    slot_ce_sum: Tensor
    correct: Tensor


def loss_counts(blocks: Blocks, *, weights: Tensor, kl: KLConfig) -> LossCounts:
    """Counts of ``loss_terms`` with the same arguments; ``weights`` [S]."""
    slot_count = blocks.label_mask.sum(dim=(0, 1))
    kl_count = slot_count[: kl.positions] if kl.alpha > 0 else torch.zeros_like(slot_count[: kl.positions])
    return LossCounts(ce_weight=(weights.to(slot_count.device) * slot_count).sum(), kl_count=kl_count, slot_count=slot_count)


def loss_terms(
    hidden: Tensor, blocks: Blocks, final: Tensor, heads: TargetHeads, *, weights: Tensor, kl: KLConfig
) -> LossTerms:
    """``hidden`` [B, A, S, D] drafted states, ``final`` [B, T, M, D] target residuals, ``weights`` [S].

    Only supervised (anchor, slot) rows reach the LM head; the teacher's states exist only for slots up to
    ``kl.positions`` and only where ``kl.alpha`` is above 0. Without any row every sum is 0 and still has a gradient.
    """
    num_anchors, num_slots = blocks.labels.shape[1:]
    kl.check_slots(num_slots)
    num_taught = kl.positions if kl.alpha > 0 else 0
    # Finding the supervised rows would wait for an accelerator, so all slots are read there and the others struck out.
    on_host = hidden.device.type == "cpu"
    rows, counted, num_early = _rows(blocks.label_mask, num_taught, supervised_only=on_host)
    block, slot = rows // num_slots, rows % num_slots
    early_block, early_slot = block[:num_early], slot[:num_early]
    before = blocks.anchors.flatten()[early_block] + early_slot  # a + k - 1, with slots counted from 0
    before = before.clamp(max=final.shape[1] - 1)  # of uncounted rows
    ce, kl_of_row, hits = row_losses(
        hidden.flatten(0, 2).index_select(0, rows).to(heads.dtype),
        blocks.labels.flatten()[rows],
        teacher_states(final, early_block // num_anchors, before, heads, kl.teacher),
        heads.lm_head.weight,
        kl.temperature,
    )
    ce, hits = ce.masked_fill(~counted, 0.0), hits & counted
    kl_of_row = kl_of_row.masked_fill(~counted[:num_early], 0.0)

    slot_ce_sum = ce.new_zeros(num_slots).index_add(0, slot, ce)
    counts = loss_counts(blocks, weights=weights, kl=kl)
    return LossTerms(
        **vars(counts),
        ce_sum=(weights.to(slot_ce_sum) * slot_ce_sum).sum(),
        kl_sum=ce.new_zeros(kl.positions).index_add(0, early_slot, kl_of_row),
        slot_ce_sum=slot_ce_sum.detach(),
        correct=torch.zeros_like(counts.slot_count).index_add(0, slot, hits.long()),
    )


def total_loss(terms: LossTerms, *, alpha: float, temperature: float, counts: LossCounts | None = None) -> Tensor:
    """Eq. 3: weighted mean cross-entropy + alpha times Eq. 2. An empty batch gives 0.

    ``counts`` of the whole step where ``terms`` are one micro-batch or one rank of it; else the terms' own.
    """
    counts = counts or terms
    cross_entropy = terms.ce_sum / counts.ce_weight.masked_fill(counts.ce_weight == 0, 1.0)
    return cross_entropy + alpha * eq2(terms.kl_sum, counts.kl_count, temperature)


def _rows(label_mask: Tensor, num_taught: int, *, supervised_only: bool) -> tuple[Tensor, Tensor, int]:
    """What the LM head reads: R flat indices into [B, A, S], whether each counts [R] bool, and how many have a teacher.

    First the slots up to ``num_taught`` of all blocks, then the others.
    """
    index = torch.arange(label_mask.numel(), device=label_mask.device).view_as(label_mask)
    rows, counted = [], []
    for part in (slice(None, num_taught), slice(num_taught, None)):
        of_part, counts = index[..., part].flatten(), label_mask[..., part].flatten()
        if supervised_only:
            of_part = of_part[counts]
            padding = (0, -len(of_part) % ROUND)
            of_part, counts = F.pad(of_part, padding), F.pad(torch.ones_like(of_part, dtype=torch.bool), padding)
        rows.append(of_part)
        counted.append(counts)
    return torch.cat(rows), torch.cat(counted), len(rows[0])
