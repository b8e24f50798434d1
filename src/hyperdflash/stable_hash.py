"""Hashes that are the same in every process, on every machine: content identity, splits and orders use only these."""

from __future__ import annotations

import hashlib


def content_hash(text: str) -> str:
    """16 hexadecimal digits of ``text``'s BLAKE2b hash."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def unit_interval(text: str, *, salt: str) -> float:
    """A number in [0, 1) that depends on ``salt`` and ``text`` alone; uniform over texts."""
    return int(content_hash(f"{salt}\x00{text}"), 16) / 2**64
