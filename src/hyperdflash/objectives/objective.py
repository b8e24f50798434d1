"""The training objective: a weighted sum of terms (Eq. 3 is cross-entropy + alpha KL), held as sums until one final division.

1. counts   masks of one micro-batch on one rank -> LossCounts, before any forward pass
2. sums     logits [B, A, S] of that micro-batch -> LossSums (sums with gradients, and the same counts)
3. +        sums and counts add up over micro-batches and ranks, so that the division can come last
4. loss     the only division -> scalar. If a step has several micro-batches or ranks, each divides its own sums by the
            counts of all of them, and the gradients add up to those of the whole step
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import add
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdflash.contracts import Blocks
from hyperdflash.objectives.distillation import teacher_states
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.objectives.row_values import Against
from hyperdflash.objectives.sweep import SHAPE_MULTIPLE
from hyperdflash.objectives.term import VIEWS, SlotBatch, SumCount, Term
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True)
class LossCounts:
    """The divisors of the sums, known from the masks alone. Adding two gives the counts of both batches together.
    ``slot_count`` [S] int64, supervised rows per slot; ``term_counts``, the divisors of each active term in order."""

    slot_count: Tensor
    term_counts: tuple[Tensor, ...]

    def __add__(self, other: Self) -> Self:
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        sums = {n: tuple(map(add, *pair)) if isinstance(pair[0], tuple) else add(*pair) for n, pair in pairs.items()}
        return type(self)(**sums)


@dataclass(frozen=True)
class LossSums(LossCounts):
    """Sums and their counts. Adding two gives the sums of both batches together. ``term_sums``, with gradients, of each active
    term in order. For logging, from the first term's view: ``slot_ce_sum`` [S], unweighted cross-entropy in nats, and ``top1``
    [S] int64, the number of labels that have the largest logit."""

    term_sums: tuple[Tensor, ...]
    slot_ce_sum: Tensor
    top1: Tensor


@dataclass(frozen=True)
class Objective:
    """``terms`` by name, as the configuration lists them. null removes a term; a term of weight 0 is not computed."""

    terms: Mapping[str, Term | None]

    def __post_init__(self):
        object.__setattr__(self, "terms", {name: term for name, term in self.terms.items() if term is not None})
        for name, term in self.terms.items():
            if not hasattr(term, "weight") and not (isinstance(term, dict) and "_target_" in term):  # not yet made
                raise ValueError(f"objective.terms.{name} names no term: write a term's keys with its _target_, or null")
        if not self.active:
            raise ValueError("an objective needs a term with a weight above 0: run with objective=paper")

    @property
    def active(self) -> tuple[Term, ...]:
        return tuple(term for term in self.terms.values() if term.weight > 0 or term.start)

    def check(self, num_slots: int, has_confidence: bool = False, views: Collection[str] = VIEWS) -> None:
        """Raises ValueError if a term does not fit the drafter or its logits' ``views``, or if none trains its confidence."""
        for term in self.terms.values():
            term.check(num_slots, has_confidence)
            if missing := {term.view, *term.needs} - set(views):
                head = f"this draft head's logits have no view {min(missing)}"
                raise ValueError(f"{head}, which objective.terms reads for {term.metric}: run with objective=paper")
        if has_confidence and not any(term.name == "confidence" for term in self.active):
            raise ValueError(
                "the draft head has a confidence and no term of the objective trains it: run with objective=dspark, or with "
                "head=markov"
            )

    def counts(self, blocks: Blocks) -> LossCounts:
        """Returns the counts of ``sums`` for the same blocks."""
        slot_count = blocks.label_mask.sum(dim=(0, 1))
        return LossCounts(slot_count, tuple(term.count(slot_count) for term in self.active))

    def sums(self, logits: FactoredLogits, blocks: Blocks, residual: Tensor, heads: TargetHeads) -> LossSums:
        """Computes all terms from ``logits`` [B, A, S] of the drafted slots and target residuals ``residual`` [B, T, M, D].
        Only supervised (anchor, slot) rows reach the vocabulary, and teacher states exist only for slots that a term reads.
        Without any row every sum is 0 and still has a gradient."""
        num_anchors, num_slots = blocks.labels.shape[1:]
        readings = [term.reading for term in self.active if term.reading is not None]
        limits = {r.source: num_slots if r.positions is None else min(r.positions, num_slots) for r in readings}
        # Selecting supervised rows would wait for an accelerator: there all slots are computed and the others masked.
        on_host = blocks.label_mask.device.type == "cpu"
        rows, counted, ends = _rows(blocks.label_mask, sorted(set(limits.values())), supervised_only=on_host)
        block, slot = rows // num_slots, rows % num_slots
        before = blocks.anchors.flatten()[block] + slot  # a + k - 1, with slots counted from 0
        before = before.clamp(max=residual.shape[1] - 1)  # rows that do not count may lie past the end
        logits, labels = logits.take(rows), blocks.labels.flatten()[rows]
        slot_count = blocks.label_mask.sum(dim=(0, 1))
        against = []
        for source, limit in limits.items():
            teacher, temperature, _ = source
            own = slice(0, ends[limit])
            states = teacher_states(residual, block[own] // num_anchors, before[own], heads, teacher)
            shared = [r for r in readings if r.source == source]
            request = Against(temperature=temperature, kl=any(r.kl for r in shared), overlap=any(r.overlap for r in shared))
            against.append((target_logits(states, heads), request))
        batches: dict[str, list[SlotBatch]] = {view: [] for view in dict.fromkeys(term.view for term in self.active)}
        for view, passes in batches.items():
            for values in (one.values(labels, against) for one in logits.view(view)):
                read = dict(zip(limits, values.against, strict=True))
                passes.append(SlotBatch(labels, slot, counted, slot_count, values, read, block, blocks.anchors.numel()))
        results = [[term(logits, batch) for batch in batches[term.view]] for term in self.active]
        batch = batches[self.active[0].view][0]
        return LossSums(
            slot_count=slot_count,
            term_counts=tuple(passes[0].count for passes in results),
            term_sums=tuple(sum(one.sum for one in passes) / len(passes) for passes in results),
            slot_ce_sum=batch.per_slot(batch.values.cross_entropy.detach()),
            top1=torch.zeros_like(slot_count).index_add(0, slot, (batch.values.top1 & counted).long()),
        )

    def loss(self, sums: LossSums, counts: LossCounts | None = None, progress: float = 1.0) -> Tensor:
        """Returns the weighted sum of the terms' means, a scalar; 0 for an empty batch. ``counts`` are those of the whole step
        if ``sums`` are those of one of its micro-batches or ranks; else the sums' own. ``progress`` is the training's."""
        counts = counts or sums
        parts = zip(self.active, sums.term_sums, counts.term_counts, strict=True)
        return sum(term.weight_at(progress) * term.mean(SumCount(total, count)) for term, total, count in parts)


def _rows(label_mask: Tensor, limits: Sequence[int], *, supervised_only: bool) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Selects the rows that reach the vocabulary, from ``label_mask`` [B, A, S] bool and ascending ``limits`` of slots. Returns
    R flat indices into [B, A, S], whether each row counts [R] bool, and per limit how many leading rows belong to slots up to
    it. Rows of slots up to the first limit come first, then those up to the next one, then the others."""
    index = torch.arange(label_mask.numel(), device=label_mask.device).view_as(label_mask)
    rows, counted, ends = [], [], {}
    for first, last in zip([0, *limits], [*limits, None], strict=True):
        of_part, counts = index[..., first:last].flatten(), label_mask[..., first:last].flatten()
        if supervised_only:
            of_part = of_part[counts]
            padding = (0, -len(of_part) % SHAPE_MULTIPLE)
            of_part, counts = F.pad(of_part, padding), F.pad(torch.ones_like(of_part, dtype=torch.bool), padding)
        rows.append(of_part)
        counted.append(counts)
        if last is not None:
            ends[last] = sum(map(len, rows))
    return torch.cat(rows), torch.cat(counted), ends
