"""Measures how much of the held-out text training has already seen: the share of its 8-grams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from hyperdflash.data.decontaminate import ngram_hashes

NGRAM = 8


def seen_share(train: Iterable[Sequence[int]], heldout: Iterable[Sequence[int]], n: int = NGRAM) -> float:
    """Returns the share, in [0, 1], of the distinct n-grams of ``heldout`` that occur in ``train``; 0.0 if it has none."""
    known = _union(train, n)
    asked = _union(heldout, n)
    return float(np.isin(asked, known, assume_unique=True).mean()) if len(asked) else 0.0


def _union(sequences: Iterable[Sequence[int]], n: int) -> np.ndarray:
    hashes = [ngram_hashes(ids, n) for ids in sequences]
    return np.unique(np.concatenate(hashes)) if hashes else np.empty(0, dtype=np.uint64)
