"""Logits as factors, features [..., F] and tables [V, F], whose product is never formed as a whole.

    z = sum over factors of features_f table_f^T

The first factor is a drafter's state and the target's frozen LM head; a low-rank head adds factors with trainable tables. Only
this module and targets/ name the LM head's weight: losses, replay, the loop and the checks take ``FactoredLogits`` from a draft
head, and the teacher's from ``target_logits``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hyperdflash.objectives.row_values import Against, RowValues
from hyperdflash.objectives.sweep import is_largest, joined, sweep
from hyperdflash.targets.heads import TargetHeads, product
from hyperdflash.targets.sampling import token_probabilities

LOGITS_BYTES = 64 << 20  # fp32 logits that exist at a time where argmax and token probabilities are read


@dataclass(frozen=True)
class FactoredLogits:
    """``features`` [..., F_f] and ``tables`` [V, F_f], one of each per factor; products are computed in ``dtype``.
    ``confidence`` [...] is the head's estimate, as a logit, that the draft of each row is accepted; None without an estimate.
    With ``top_k`` only that many candidates are drafted, those with the largest logits of the first factor; ``values`` still
    reads all logits. ``free``: logits of the same rows after the drafter's own tokens, which a loss may read too.
    """

    features: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    dtype: torch.dtype
    confidence: Tensor | None = None
    top_k: int | None = None
    free: tuple[Self, ...] = ()

    def plus(self, features: Tensor, table: Tensor) -> Self:
        """Adds a factor: ``features`` [..., F], ``table`` [V, F]."""
        return replace(self, features=(*self.features, features), tables=(*self.tables, table))

    def view(self, name: str) -> tuple[Self, ...]:
        """Returns the logits of a term's ``view`` (term.py): all factors, the first one (the LM head's), or ``free``."""
        first = replace(self, features=self.features[:1], tables=self.tables[:1], top_k=None)
        return {"head": (self,), "lm_head": (first,), "free": self.free}[name]

    def __getitem__(self, index) -> Self:
        confidence = None if self.confidence is None else self.confidence[index]
        return replace(self, features=tuple(x[index] for x in self.features), confidence=confidence)

    def take(self, rows: Tensor) -> Self:
        """Selects R rows by ``rows`` [R] int64, indices into the flattened leading dimensions."""
        features = tuple(x.flatten(0, -2).index_select(0, rows) for x in self.features)
        confidence = None if self.confidence is None else self.confidence.flatten().index_select(0, rows)
        return replace(self, features=features, confidence=confidence, free=tuple(x.take(rows) for x in self.free))

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
        return is_largest(self.joined(), labels, self.tables) if self.top_k is None else self.argmax() == labels

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """Returns the token with the largest logit of each row, the first of equals: int64 [R], from a few rows at a time."""
        return self.by_rows(lambda rows, _: rows.dense().argmax(dim=-1))

    @torch.no_grad()
    def token_probabilities(
        self, token_ids: Tensor, temperature: float, top_p: float = 1.0, logits_bytes: int = LOGITS_BYTES
    ) -> Tensor:
        """Returns the probability of one token per row, int64 [R] -> fp32 [R], from ``logits_bytes`` of logits at a time."""
        return self.by_rows(lambda x, rows: token_probabilities(x.dense(), token_ids[rows], temperature, top_p), logits_bytes)

    def by_rows(self, read: Callable[[Self, slice], Tensor], logits_bytes: int = LOGITS_BYTES) -> Tensor:
        """Joins what ``read`` gives [n, ...] for a few rows at a time, whose whole logits take ``logits_bytes``. The backward
        pass computes them again."""
        size = max(1, logits_bytes // (4 * len(self.tables[0])))
        parts = [slice(start, start + size) for start in range(0, max(1, len(self.features[0])), size)]
        return torch.cat([checkpoint(read, self[part], part, use_reentrant=False, preserve_rng_state=False) for part in parts])

    def dense(self, first: Tensor | None = None) -> Tensor:
        """Returns whole logits [..., V] fp32, -inf where nothing is drafted: for a few rows. ``first`` is the product of the
        first factor, if it is known."""
        others = [product(x.to(self.dtype), table) for x, table in zip(self.features[1:], self.tables[1:], strict=True)]
        first = product(self.features[0].to(self.dtype), self.tables[0]) if first is None else first
        logits = sum(others, first)
        if self.top_k is None:
            return logits
        kept = first.topk(self.top_k, dim=-1).indices
        return torch.full_like(logits, float("-inf")).scatter(-1, kept, logits.gather(-1, kept))


def target_logits(hidden: Tensor, heads: TargetHeads) -> FactoredLogits:
    """Returns the logits of the target's frozen LM head for normed states [..., D]."""
    return FactoredLogits((hidden,), (heads.lm_head.weight,), heads.dtype)
