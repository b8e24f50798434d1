"""One term of the training loss: what it reads from a sweep over the vocabulary, and how its sums become a scalar.

1. count      masks of one micro-batch on one rank -> divisors, before any forward pass
2. __call__   logits and values of R rows -> sums with gradients, beside the same divisors
3. mean       sums and divisors, each added up over micro-batches and ranks -> the term's scalar; the only division

A term is a frozen dataclass that a configuration lists under ``objective.terms``. All active terms of an objective share one
sweep.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.objectives.row_values import Divergences, RowValues
from hyperdflash.settings import number_between, one_of, positive_number

VIEWS = ("head", "lm_head", "free")  # of a term


@dataclass(frozen=True)
class SumCount:
    """``sum``, with gradients, and its divisor ``count``, of the same shape. Adding two adds both."""

    sum: Tensor
    count: Tensor

    def __add__(self, other: Self) -> Self:
        return SumCount(self.sum + other.sum, self.count + other.count)


@dataclass(frozen=True)
class Reading:
    """The divergences from the target that a term reads, for all slots or for the first ``positions`` P. ``teacher`` says how
    the target's paths collapse: mean_pool (the paper's) or hc_head (the target's exact distribution). ``temperature`` applies
    to both distributions. ``kl`` requests KL(teacher || drafter), ``overlap`` sum_v min(p_v, q_v)."""

    teacher: str
    temperature: float = 1.0
    positions: int | None = None
    kl: bool = False
    overlap: bool = False

    @property
    def source(self) -> tuple[str, float, int | None]:
        """The key of its teacher: readings with equal sources share one."""
        return self.teacher, self.temperature, self.positions


@dataclass(frozen=True)
class SlotBatch:
    """R drafted slots of one micro-batch. ``labels`` [R] int64; ``slot`` [R] int64, counted from 0; ``counted`` [R] bool
    (False: the row is padding); ``slot_count`` [S] int64, supervised rows per slot; ``values`` of every row; ``block`` [R]
    int64 among ``num_blocks``."""

    labels: Tensor
    slot: Tensor
    counted: Tensor
    slot_count: Tensor
    values: RowValues
    read: dict[tuple[str, float, int | None], Divergences]
    block: Tensor
    num_blocks: int

    def divergences(self, reading: Reading) -> Divergences:
        """Returns the divergences of the E rows that ``reading`` covers, which are the first E."""
        return self.read[reading.source]

    def per_slot(self, values: Tensor) -> Tensor:
        """Sums ``values`` [n] of the first n rows per slot, over counted rows alone -> [S]."""
        values, num_rows = values.masked_fill(~self.counted[: len(values)], 0.0), len(values)
        return values.new_zeros(len(self.slot_count)).index_add(0, self.slot[:num_rows], values)


class Term:
    """``name``; ``weight`` of its mean in the loss: a term of weight 0 is not computed. With a ``start`` the weight goes from
    there to ``weight`` over the first half of the training. ``view``: the logits that it reads, those of the draft head, of
    the LM head alone, or (free) the mean over passes after the drafter's own tokens. ``needs``: further views of its head."""

    name: str
    weight: float
    start: float | None = None
    view: str = "head"
    needs: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """Its name in the log, below ``train/``."""
        return self.name if self.view == "head" else f"{self.view}_{self.name}"

    def weight_at(self, progress: float) -> float:
        """Returns its weight where a share ``progress`` of the training is done, 0 to 1."""
        return self.weight if self.start is None else self.weight + (self.start - self.weight) * max(0.0, 1 - 2 * progress)

    @property
    def reading(self) -> Reading | None:
        """The part of the target that the term reads; None if it needs labels alone."""
        return None

    def check(self, num_slots: int, has_confidence: bool) -> None:
        """Raises ValueError if the term does not fit a drafter with ``num_slots`` S."""

    def count(self, slot_count: Tensor) -> Tensor:
        """Returns the divisors of the term's sums for ``slot_count`` [S] int64; by default one per slot."""
        return slot_count

    def __call__(self, logits: FactoredLogits, batch: SlotBatch) -> SumCount:
        """Returns the sums of one micro-batch, with ``count(batch.slot_count)`` as their divisors."""
        raise NotImplementedError

    def mean(self, total: SumCount) -> Tensor:
        """Returns a scalar: by default the sum over all slots divided by the count of all, or 0 if every count is 0."""
        count = total.count.sum()
        return total.sum.sum() / count.masked_fill(count == 0, 1)


@dataclass(frozen=True, kw_only=True)
class SlotWeighted(Term):
    """sum w_k v / sum w_k over supervised slots, of a value v per row; ``gamma`` as in ``position_weights``. ``option`` names
    the term's group in messages, by default ``objective.terms.<name>``."""

    weight: float = 1.0
    gamma: float | None = None
    start: float | None = None
    view: str = "head"

    option: ClassVar[str | None] = None

    def __post_init__(self):
        option = self.option or f"objective.terms.{self.name}"
        for name in ("weight", *(["start"] if self.start is not None else [])):
            number_between(f"{option}.{name}", getattr(self, name), 0.0, float("inf"))
        one_of(f"{option}.view", self.view, VIEWS)
        if self.gamma is not None:
            positive_number(f"{option}.gamma", self.gamma)

    def of_rows(self, logits: FactoredLogits, batch: SlotBatch) -> Tensor:
        """Returns v [R], with gradients."""
        raise NotImplementedError

    def count(self, slot_count: Tensor) -> Tensor:
        return position_weights(len(slot_count), self.gamma, slot_count.device) * slot_count

    def __call__(self, logits: FactoredLogits, batch: SlotBatch) -> SumCount:
        of_slot = batch.per_slot(self.of_rows(logits, batch))
        weights = position_weights(len(of_slot), self.gamma, of_slot.device)
        return SumCount(weights.to(of_slot) * of_slot, self.count(batch.slot_count))


def position_weights(num_slots: int, gamma: float | None, device: torch.device | str = "cpu") -> Tensor:
    """Returns w_k = exp(-(k - 1) / gamma), [S] fp32 (DFlash): an early miss discards every later slot. None: all w_k are 1."""
    if gamma is None:
        return torch.ones(num_slots, device=device)
    return torch.exp(-torch.arange(num_slots, device=device) / gamma)
