"""How much of the held-out text training has already seen: shares of its 8-grams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

NGRAM = 8


def rolling_hashes(ids: Sequence[int], longest: int) -> Iterator[tuple[int, np.ndarray]]:
    """(n, uint64 [T - n + 1]) for n = 1 .. ``longest``: the hash of the n-gram that starts at each of ``ids`` [T]; ends where
    none fits. Each step goes on from the one before."""
    tokens = np.asarray(ids, dtype=np.uint64)
    mixed = np.zeros(len(tokens), dtype=np.uint64)
    for n in range(1, min(longest, len(tokens)) + 1):
        mixed = mixed[: len(tokens) - n + 1]
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        mixed += tokens[n - 1 :] + np.uint64(1)
        yield n, mixed


def ngram_hashes(ids: Sequence[int], n: int = NGRAM) -> np.ndarray:
    """Unique uint64 hashes of the n-grams of ``ids`` [T], at most T - n + 1 of them."""
    found = [hashes for length, hashes in rolling_hashes(ids, n) if length == n]
    return np.unique(found[0]) if found else np.empty(0, dtype=np.uint64)


def seen_share(train: Iterable[Sequence[int]], heldout: Iterable[Sequence[int]], n: int = NGRAM) -> float:
    """Share, in [0, 1], of the distinct n-grams of ``heldout`` that occur in ``train``; 0.0 if there are none."""
    known = _union(train, n)
    asked = _union(heldout, n)
    return float(np.isin(asked, known, assume_unique=True).mean()) if len(asked) else 0.0


def _union(sequences: Iterable[Sequence[int]], n: int) -> np.ndarray:
    hashes = [ngram_hashes(ids, n) for ids in sequences]
    return np.unique(np.concatenate(hashes)) if hashes else np.empty(0, dtype=np.uint64)
