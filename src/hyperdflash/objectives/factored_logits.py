"""Logits as factors, features [..., F] and tables [V, F], whose product is never formed as a whole.

    z = sum over factors of features_f table_f^T

The first factor is a drafter's state and the target's frozen LM head; a low-rank head adds factors with trainable tables. Only
this module and targets/ name the LM head's weight: losses, replay, the loop and the checks take ``FactoredLogits`` from a draft
head, and the teacher's from ``target_logits``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from hyperdflash.objectives.row_values import Against, RowValues
from hyperdflash.objectives.sweep import is_largest, joined, sweep
from hyperdflash.targets.heads import TargetHeads, product
from hyperdflash.targets.sampling import token_probabilities

LOGITS_BYTES = 64 << 20  # fp32 logits that exist at a time where argmax and token probabilities are read


@dataclass(frozen=True)
class FactoredLogits:
    """``features`` [..., F_f] and ``tables`` [V, F_f], one of each per factor; products are computed in ``dtype``.
    ``confidence`` [...] is the head's estimate, as a logit, that the draft of each row is accepted; None without an estimate.
    """

    features: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    dtype: torch.dtype
    confidence: Tensor | None = None

    def plus(self, features: Tensor, table: Tensor) -> Self:
        """Adds a factor: ``features`` [..., F], ``table`` [V, F]."""
        return replace(self, features=(*self.features, features), tables=(*self.tables, table))

    def view(self, name: str) -> Self:
        """Returns the logits of a term's ``view`` (term.py): all factors, or the first one, which is the LM head's."""
        return self if name == "head" else replace(self, features=self.features[:1], tables=self.tables[:1])

    def without_first(self) -> Self:
        """Leaves out the first factor, which is the LM head's."""
        return replace(self, features=self.features[1:], tables=self.tables[1:])

    def __getitem__(self, index) -> Self:
        confidence = None if self.confidence is None else self.confidence[index]
        return replace(self, features=tuple(x[index] for x in self.features), confidence=confidence)

    def take(self, rows: Tensor) -> Self:
        """Selects R rows by ``rows`` [R] int64, indices into the flattened leading dimensions."""
        features = tuple(x.flatten(0, -2).index_select(0, rows) for x in self.features)
        confidence = None if self.confidence is None else self.confidence.flatten().index_select(0, rows)
        return replace(self, features=features, confidence=confidence)

    def joined(self, tables: Sequence[Tensor] | None = None) -> Tensor:
        """Returns all factors' features side by side, [R, F] in ``dtype``, in the order of ``tables``; 0 for absent factors."""
        if tables is None or len(tables) == len(self.tables):
            return joined([x.to(self.dtype) for x in self.features])
        own = {id(table): x for table, x in zip(self.tables, self.features, strict=True)}
        missing = [table for table in self.tables if not any(table is other for other in tables)]
        assert not missing, "a teacher's tables are among the student's"
        rows = self.features[0].shape[:-1]
        parts = [own[id(t)] if id(t) in own else t.new_zeros(*rows, t.shape[1]) for t in tables]
        return joined([x.to(self.dtype) for x in parts])

    def values(self, labels: Tensor, against: Sequence[tuple[Self, Against]] = ()) -> RowValues:
        """Returns cross-entropy and top-1 of R rows with ``labels`` [R], and divergences of the first E rows from teachers of E
        rows, by one sweep over the vocabulary. Features and trainable tables get gradients."""
        teachers = [replace(one, teacher=logits.joined(self.tables)) for logits, one in against]
        return sweep(self.joined(), labels, self.tables, teachers)

    @torch.no_grad()
    def is_argmax(self, labels: Tensor) -> Tensor:
        """Returns whether ``argmax`` of each row is its label: ``labels`` [R] int64 -> bool [R], without [R, V] logits."""
        return is_largest(self.joined(), labels, self.tables)

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """Returns the token with the largest logit of each row, the first of equals: int64 [R], from a few rows at a time."""
        size = max(1, LOGITS_BYTES // (4 * len(self.tables[0])))
        starts = range(0, len(self.features[0]), size)
        parts = [self[start : start + size].dense().argmax(dim=-1) for start in starts]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=self.features[0].device)

    @torch.no_grad()
    def token_probabilities(
        self, token_ids: Tensor, temperature: float, top_p: float = 1.0, logits_bytes: int = LOGITS_BYTES
    ) -> Tensor:
        """Returns the probability of one token per row, int64 [R] -> fp32 [R], from ``logits_bytes`` of logits at a time."""
        size = max(1, logits_bytes // (4 * len(self.tables[0])))
        parts = [
            token_probabilities(self[start : start + size].dense(), ids, temperature, top_p)
            for start, ids in zip(range(0, len(token_ids), size), token_ids.split(size), strict=False)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, device=token_ids.device)

    def dense(self) -> Tensor:
        """Returns whole logits [..., V] fp32: for a few rows."""
        parts = [product(x.to(self.dtype), table) for x, table in zip(self.features, self.tables, strict=True)]
        return sum(parts[1:], parts[0])


def target_logits(hidden: Tensor, heads: TargetHeads) -> FactoredLogits:
    """Returns the logits of the target's frozen LM head for normed states [..., D]."""
    return FactoredLogits((hidden,), (heads.lm_head.weight,), heads.dtype)
