"""Finds near-duplicates: texts that are equal after folding, or that share most of their token shingles.

1. fold       lower case, digits to 0, white space to one space; code also has names numbered by appearance and strings folded
2. shingles   4 folded tokens each; MinHash of 32 values in 8 bands (Broder 1997): a shared band makes two texts candidates
3. compare    candidates whose shingle sets overlap by at least 0.7 (Jaccard) are the same text; the first one stays
"""

from __future__ import annotations

import builtins
import keyword
import re
import zlib
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from hyperdflash.stable_hash import fold_text

_CODE_TOKEN = re.compile(r"""(?:\b[rbfuRBFU]{1,2})?('''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|(\.?\b[A-Za-z_]\w*)|(\d[\w.]*)|(\S)""", re.S)  # fmt: skip # noqa: E501
_WORD = re.compile(r"[a-z_0]+|[^\sa-z_0]")
_KEPT_NAMES = frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"self", "cls"}

_SHINGLE, _ROWS, _BANDS = 4, 4, 8
_SAME = 0.7  # Jaccard overlap of shingles
_MAX_CANDIDATES = 24  # compared per text; bounds the cost on very common openings


def fold_code(source: str) -> str:
    """Returns the tokens of code: names numbered by appearance, attributes in lower case, strings and numbers folded."""
    names: dict[str, str] = {}
    tokens = []
    for string, name, number, sign in _CODE_TOKEN.findall(source):
        if string:
            tokens.append("'s'")
        elif name:
            kept = name in _KEPT_NAMES or name.startswith(".")
            tokens.append(fold_text(name) if kept else names.setdefault(name, f"v{len(names)}"))
        elif number:
            tokens.append("0")
        else:
            tokens.append(sign)
    return " ".join(tokens)


def _shingles(folded: str) -> np.ndarray:
    """Returns the sorted unique uint64 hashes of the token windows."""
    tokens = folded.split(" ") if " " in folded else _WORD.findall(folded)
    hashes = np.array([zlib.crc32(token.encode()) for token in tokens] or [0], dtype=np.uint64)
    width = min(_SHINGLE, len(hashes))
    windows = len(hashes) - width + 1
    mixed = np.zeros(windows, dtype=np.uint64)
    for offset in range(width):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + windows] + np.uint64(1)
    return np.unique(mixed)


def first_of_each(folded: Sequence[str]) -> list[bool]:
    """Returns one entry per folded text, in order: True where no earlier True text is a near-duplicate of it."""
    generator = np.random.Generator(np.random.PCG64(20240611))
    multiplier = generator.integers(1, 2**63, _ROWS * _BANDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shift = generator.integers(0, 2**63, _ROWS * _BANDS, dtype=np.uint64)
    seen: set[str] = set()
    shingles: list[np.ndarray] = []
    buckets: dict[tuple[int, bytes], list[int]] = {}
    keep = []
    for text in tqdm(folded, unit="text", desc="corpus: near-duplicates"):
        if text in seen:
            keep.append(False)
            continue
        seen.add(text)
        own = _shingles(text)
        mixed = own[:, None] * multiplier + shift
        signature = (mixed ^ (mixed >> np.uint64(29))).min(axis=0)
        bands = [(band, signature[band * _ROWS : (band + 1) * _ROWS].tobytes()) for band in range(_BANDS)]
        candidates = dict.fromkeys(index for band in bands for index in buckets.get(band, ()))
        if any(_jaccard(own, shingles[index]) >= _SAME for index in list(candidates)[:_MAX_CANDIDATES]):
            keep.append(False)
            continue
        for band in bands:
            buckets.setdefault(band, []).append(len(shingles))
        shingles.append(own)
        keep.append(True)
    return keep


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
