"""Hashes that are equal in every process and on every machine; content identity, splits and orders use only these."""

import hashlib
import re


def content_hash(text: str) -> str:
    """Returns 16 hexadecimal digits of the BLAKE2b hash of ``text``."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def unit_interval(text: str, *, salt: str) -> float:
    """Returns a number in [0, 1) that depends on ``salt`` and ``text`` alone; uniform over texts."""
    return int(content_hash(f"{salt}\x00{text}"), 16) / 2**64


def fold_text(text: str) -> str:
    """Returns ``text`` in lower case, every run of digits as 0, one space between words."""
    return " ".join(re.sub(r"\d+", "0", text.lower()).split())
