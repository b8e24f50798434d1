"""An interpolated Kneser-Ney n-gram over token ids: the baseline that a target's bits per byte must beat.

Modified Kneser-Ney (Chen and Goodman 1998, section 4.1.6): three discounts an order, estimated from counts of counts.

    p_n(w | h) = (c(hw) - D(c(hw))) / c(h) + freed(h) / c(h) * p_{n-1}(w | h'),      p_0(w) = 1 / V
    c           occurrences at the highest order, number of different left neighbours below it
    freed(h)    what was discounted from h's continuations; p_n(. | h) = p_{n-1}(. | h') where h was never seen

Arrays only: a gram of n tokens is the rank of (rank of its first n - 1 tokens) * V + last token among all such keys.
A document's first token is given, not predicted, and repeated to the left, so that every other one has a full context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hyperdflash.settings import positive_int


@dataclass(frozen=True)
class Order:
    """Grams of n tokens. ``keys`` [G] ascending, ``counts`` [G], ``discounts`` [4] by min(count, 3);
    ``totals`` and ``freed`` [grams of n - 1 tokens]: c(h) and freed(h)."""

    keys: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray
    totals: np.ndarray
    freed: np.ndarray


class KneserNey:
    """Trained on ``documents``, each a sequence of ids in 0..vocab_size - 1."""

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int, order: int = 5):
        check_order(order)
        if not len(documents):
            raise ValueError("an n-gram baseline needs training documents, got none: check the corpus's train split")
        self.vocab_size, self.order = vocab_size, order
        stream, events = self._stream(documents)
        grams = [np.zeros(len(stream), dtype=np.int64)]  # the empty gram
        keys, counts, places = [], [], []
        for _ in range(order):
            found, ids = np.unique(_shift(grams[-1]) * vocab_size + stream, return_inverse=True)
            place = np.zeros(len(found), dtype=np.int64)
            place[ids[events]] = events  # one predicted occurrence of each gram
            grams.append(ids)
            keys.append(found)
            counts.append(np.bincount(ids[events], minlength=len(found)))
            places.append(place)
        for n in range(order - 1, 0, -1):  # below the highest order: different left neighbours
            suffixes = grams[n][places[n][counts[n] > 0]]
            counts[n - 1] = np.bincount(suffixes, minlength=len(keys[n - 1]))
        sizes = [1, *map(len, keys)]
        self.orders = [_order(keys[n], counts[n], vocab_size, sizes[n]) for n in range(order)]

    def nats(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        """-log p of every token but each document's first, in order: fp64 [tokens - documents]."""
        stream, events = self._stream(documents)
        grams = np.zeros(len(stream), dtype=np.int64)
        p = np.full(len(stream), 1 / self.vocab_size)
        for order in self.orders:
            context = _shift(grams)
            key = np.where(context >= 0, context * self.vocab_size + stream, -1)
            rank = np.searchsorted(order.keys, key).clip(max=len(order.keys) - 1)
            grams = np.where(order.keys[rank] == key, rank, -1)
            count = np.where(grams >= 0, order.counts[rank], 0)
            total = np.where(context >= 0, order.totals[context], 0)
            kept = count - order.discounts[count.clip(max=3)]
            p = np.where(total > 0, (kept + order.freed[context] * p) / np.maximum(total, 1), p)
        return -np.log(p[events])

    def _stream(self, documents: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Documents end to end with their padding, int64 [N], and the positions of predicted tokens, int64 [E]."""
        padding = self.order - 2
        parts = [np.asarray(ids, dtype=np.int64) for ids in documents]
        stream = np.concatenate([np.concatenate([np.repeat(ids[:1], padding), ids]) for ids in parts])
        predicted = np.concatenate([np.arange(len(ids) + padding) > padding for ids in parts])
        return stream, predicted.nonzero()[0]


def check_order(order: object) -> int:
    """ValueError for what is no order of an n-gram with a context."""
    if positive_int("ngram_order", order) < 2:
        raise ValueError(f"ngram_order must be at least 2, got {order}: give 5")
    return order


def _shift(grams: np.ndarray) -> np.ndarray:
    """Rank of the gram that ends one token earlier; the stream's first position is padding, any value serves."""
    return np.concatenate([grams[:1] * 0, grams[:-1]])


def _order(keys: np.ndarray, counts: np.ndarray, vocab_size: int, num_contexts: int) -> Order:
    discounts = _discounts(counts)
    context = keys // vocab_size
    freed = np.bincount(context, weights=discounts[counts.clip(max=3)], minlength=num_contexts)
    return Order(keys, counts, discounts, np.bincount(context, weights=counts, minlength=num_contexts), freed)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D for counts 0, 1, 2 and >= 3; within (0, count], so that something is always freed for unseen tokens."""
    n = np.bincount(counts.clip(max=5), minlength=6).astype(float)
    share = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
    raw = [i - (i + 1) * share * n[i + 1] / n[i] if n[i] else 0.5 for i in (1, 2, 3)]
    return np.array([0.0, *(min(max(d, 0.05), i) for i, d in enumerate(raw, start=1))])
