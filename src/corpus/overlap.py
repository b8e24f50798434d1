"""How much of the held-out text training has already seen: shares of its 8-grams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

NGRAM = 8


def ngram_hashes(ids: Sequence[int], n: int = NGRAM) -> np.ndarray:
    """Unique uint64 hashes of the n-grams of ``ids`` [T], at most T - n + 1 of them."""
    tokens = np.asarray(ids, dtype=np.uint64)
    windows = len(tokens) - n + 1
    if windows < 1:
        return np.empty(0, dtype=np.uint64)
    mixed = np.zeros(windows, dtype=np.uint64)
    for offset in range(n):
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        mixed = mixed + tokens[offset : offset + windows] + np.uint64(1)
    return np.unique(mixed)


def seen_share(train: Iterable[Sequence[int]], heldout: Iterable[Sequence[int]], n: int = NGRAM) -> float:
    """Share, in [0, 1], of the distinct n-grams of ``heldout`` that occur in ``train``; 0.0 if there are none."""
    known = _union(train, n)
    asked = _union(heldout, n)
    return float(np.isin(asked, known, assume_unique=True).mean()) if len(asked) else 0.0


def _union(sequences: Iterable[Sequence[int]], n: int) -> np.ndarray:
    hashes = [ngram_hashes(ids, n) for ids in sequences]
    return np.unique(np.concatenate(hashes)) if hashes else np.empty(0, dtype=np.uint64)
