"""One summand of the training loss: what it reads of a sweep over the vocabulary, and how its sums become a scalar.

1. count      masks of one micro-batch on one rank -> divisors, before any forward pass
2. __call__   logits and values of R rows -> sums with gradients, beside the same divisors
3. mean       sums and divisors, each added up over micro-batches and ranks -> the term's scalar; the only division

A term is a frozen dataclass that a configuration names under ``objective.terms``. Every active term of an objective reads the
same sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import Tensor

from hyperdflash.objectives.row_values import Divergences, RowValues

if TYPE_CHECKING:
    from hyperdflash.objectives.factored_logits import FactoredLogits


@dataclass(frozen=True)
class SumCount:
    """``sum`` with gradients and ``count``, its divisor, of one shape; adding two is that of both batches together."""

    sum: Tensor
    count: Tensor

    def __add__(self, other: Self) -> Self:
        return SumCount(self.sum + other.sum, self.count + other.count)


@dataclass(frozen=True)
class Reading:
    """What a term reads of the target beside each slot, all slots or those up to ``positions`` P.

    ``teacher`` how the target's paths collapse: mean_pool (the paper's) or hc_head (the target's exact distribution);
    ``temperature`` of both distributions; ``kl`` KL(teacher || drafter), ``overlap`` sum over v of min(p_v, q_v).
    """

    teacher: str
    temperature: float = 1.0
    positions: int | None = None
    kl: bool = False
    overlap: bool = False

    @property
    def source(self) -> tuple[str, float, int | None]:
        """Readings with equal sources share one teacher."""
        return self.teacher, self.temperature, self.positions


@dataclass(frozen=True)
class SlotBatch:
    """R drafted slots of one micro-batch.

    ``labels`` [R] int64, ``slot`` [R] int64 counted from 0, ``counted`` [R] bool (False: a row that pads the batch),
    ``slot_count`` [S] int64 supervised slots, ``values`` of every row.
    """

    labels: Tensor
    slot: Tensor
    counted: Tensor
    slot_count: Tensor
    values: RowValues
    read: dict[tuple[str, float, int | None], Divergences]

    def divergences(self, reading: Reading) -> Divergences:
        """Of the rows that ``reading`` covers: the first E."""
        return self.read[reading.source]

    def per_slot(self, values: Tensor) -> Tensor:
        """``values`` [n] of the first n rows -> sums over counted rows, [S]."""
        values, num_rows = values.masked_fill(~self.counted[: len(values)], 0.0), len(values)
        return values.new_zeros(len(self.slot_count)).index_add(0, self.slot[:num_rows], values)


class Term:
    """``name`` of its metric ``train/<name>``; ``weight`` of its mean in the loss: at 0 nothing of it is computed."""

    name: str
    weight: float

    @property
    def reading(self) -> Reading | None:
        """What it reads of the target; None where labels are enough."""
        return None

    def check(self, num_slots: int, has_confidence: bool) -> None:
        """ValueError where it does not fit a drafter with ``num_slots`` S."""

    def count(self, slot_count: Tensor) -> Tensor:
        """Supervised slots [S] int64 -> divisors of its sums, by default one per slot."""
        return slot_count

    def __call__(self, logits: FactoredLogits, batch: SlotBatch) -> SumCount:
        """Sums of one micro-batch beside ``count(batch.slot_count)``."""
        raise NotImplementedError

    def mean(self, total: SumCount) -> Tensor:
        """Scalar, by default the sum over all slots by the count of all; without any count 0."""
        count = total.count.sum()
        return total.sum.sum() / count.masked_fill(count == 0, 1)
