"""Logits as products that are never formed as a whole: features [..., F] against tables [V, F].

    z = sum over factors of features_f table_f^T

The first factor is a drafter's state against the target's frozen LM head; a head of low rank adds factors with tables that
train. This is the one place outside targets/ that names the LM head's weight: losses, replay, the loop and the checks ask a
draft head for its ``FactoredLogits``, and read the teacher through ``target_logits``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdflash.objectives.row_values import Against, RowValues
from hyperdflash.objectives.sweep import is_largest, sweep
from hyperdflash.targets.sampling import token_probabilities

if TYPE_CHECKING:
    from hyperdflash.targets.heads import TargetHeads

TABLE_ROWS = 1 << 14  # that are converted to the products' dtype together
LOGITS_BYTES = 64 << 20  # of the fp32 logits that token probabilities are read from at a time


@dataclass(frozen=True)
class FactoredLogits:
    """``features`` [..., F_f] and ``tables`` [V, F_f], one of each per factor; products are formed in ``dtype``.

    ``confidence`` [...] the head's own estimate, as a logit, that the draft of each row is accepted; None where it has none.
    """

    features: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    dtype: torch.dtype
    confidence: Tensor | None = None

    def plus(self, features: Tensor, table: Tensor) -> FactoredLogits:
        """With one more factor: ``features`` [..., F], ``table`` [V, F]."""
        return replace(self, features=(*self.features, features), tables=(*self.tables, table))

    def with_confidence(self, confidence: Tensor | None) -> FactoredLogits:
        """With ``confidence`` [...] of every row."""
        return replace(self, confidence=confidence)

    def __getitem__(self, index) -> FactoredLogits:
        """The rows that ``index`` picks of the leading dimensions [...]."""
        confidence = None if self.confidence is None else self.confidence[index]
        return replace(self, features=tuple(x[index] for x in self.features), confidence=confidence)

    def take(self, rows: Tensor) -> FactoredLogits:
        """``rows`` [R] int64 of the flattened leading dimensions -> logits of R rows."""
        features = tuple(x.flatten(0, -2).index_select(0, rows) for x in self.features)
        confidence = None if self.confidence is None else self.confidence.flatten().index_select(0, rows)
        return replace(self, features=features, confidence=confidence)

    def joined(self, tables: Sequence[Tensor] | None = None) -> Tensor:
        """[R, F] in ``dtype``: features of all factors side by side; those of ``tables`` that this lacks are 0."""
        if tables is None or len(tables) == len(self.tables):
            return _side_by_side([x.to(self.dtype) for x in self.features])
        own = {id(table): x for table, x in zip(self.tables, self.features, strict=True)}
        missing = [table for table in self.tables if not any(table is other for other in tables)]
        assert not missing, "a teacher's tables are among the student's"
        rows = self.features[0].shape[:-1]
        parts = [own[id(t)] if id(t) in own else t.new_zeros(*rows, t.shape[1]) for t in tables]
        return _side_by_side([x.to(self.dtype) for x in parts])

    def values(self, labels: Tensor, against: Sequence[tuple[FactoredLogits, Against]] = ()) -> RowValues:
        """Cross-entropy and top-1 of R rows with ``labels`` [R], and divergences of its first E rows from teachers of E rows:
        one sweep over the vocabulary for all of them, with gradients for features and for every table that trains."""
        teachers = [replace(one, teacher=logits.joined(self.tables)) for logits, one in against]
        return sweep(self.joined(), labels, self.tables, teachers)

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """``labels`` [R] int64 -> nats [R], at least fp32."""
        return self.values(labels).cross_entropy

    def kl(self, teacher: FactoredLogits, temperature: float = 1.0) -> Tensor:
        """KL(teacher || self) of every row at ``temperature``: nats [R]; the teacher is detached."""
        labels = torch.zeros(len(self.features[0]), dtype=torch.int64, device=self.features[0].device)
        return self.values(labels, [(teacher, Against(temperature=temperature, kl=True))]).against[0].kl

    def overlap(self, teacher: FactoredLogits, temperature: float = 1.0) -> Tensor:
        """sum over v of min(p_v, q_v), which is 1 - total variation: [R]; the teacher is detached."""
        labels = torch.zeros(len(self.features[0]), dtype=torch.int64, device=self.features[0].device)
        return self.values(labels, [(teacher, Against(temperature=temperature, overlap=True))]).against[0].overlap

    @torch.no_grad()
    def is_argmax(self, labels: Tensor) -> Tensor:
        """Whether ``labels`` [R] have their rows' largest logits, as the first of equals: bool [R]."""
        return is_largest(self.joined(), labels, self.tables)

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """Token with the largest logit of each row, the first of equals: int64 [R], from few rows of logits at a time."""
        size = max(1, LOGITS_BYTES // (4 * len(self.tables[0])))
        starts = range(0, len(self.features[0]), size)
        parts = [self[start : start + size].dense().argmax(dim=-1) for start in starts]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=self.features[0].device)

    @torch.no_grad()
    def token_probabilities(
        self, token_ids: Tensor, temperature: float, top_p: float = 1.0, logits_bytes: int = LOGITS_BYTES
    ) -> Tensor:
        """Probability of one token per row, int64 [R] -> fp32 [R], from at most ``logits_bytes`` of logits at a time."""
        size = max(1, logits_bytes // (4 * len(self.tables[0])))
        parts = [
            token_probabilities(self[start : start + size].dense(), ids, temperature, top_p)
            for start, ids in zip(range(0, len(token_ids), size), token_ids.split(size), strict=False)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, device=token_ids.device)

    def dense(self) -> Tensor:
        """[..., V] fp32: for few rows."""
        parts = [_product(x.to(self.dtype), table) for x, table in zip(self.features, self.tables, strict=True)]
        return sum(parts[1:], parts[0])


def target_logits(hidden: Tensor, heads: TargetHeads) -> FactoredLogits:
    """Normed states [..., D] against the target's frozen LM head."""
    return FactoredLogits((hidden,), (heads.lm_head.weight,), heads.dtype)


def _product(features: Tensor, table: Tensor) -> Tensor:
    if table.dtype == features.dtype:
        return F.linear(features, table).float()
    return torch.cat([F.linear(features, rows.to(features.dtype)) for rows in table.split(TABLE_ROWS)], dim=-1).float()


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
