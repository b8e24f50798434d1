"""A tokenizer trained in milliseconds, and a small package on disk to scan."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_target.tokenizer import train_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "def first(items):\n    for item in items:\n        if item:\n            return item\n    return None\n",
    "What does `add` do? It returns the sum of a and b.",
    "Anna has 3 apples and buys 14 more. How many apples does Anna have now?",
]

MODULE = '''
"""Small tools for lists of numbers. They keep no state."""

def total(values, start=0):
    """Return the sum of all values.

    Parameters
    ----------
    values : list
    """
    # a comment
    result: int = start
    for value in values:
        result += value
    return result


def summe(zahlen, anfang=10):
    """Compute what the numbers add up to."""
    ergebnis = anfang
    for zahl in zahlen:
        ergebnis += zahl
    return ergebnis


class Counter(dict):
    """Counts things by name. The counts never fall."""

    @property
    def biggest(self) -> str:
        """Return the name with the largest count."""
        return max(self, key=lambda name: self[name], default=None)

    async def wait(self, seconds: float = 1.5, *, quietly=False):
        """waits for some seconds"""
        while seconds > 0 and not quietly:
            seconds = await self.tick(seconds)

    def undocumented(self):
        return [value for value in self.values() if value]

    def stub(self):
        """Return something in a subclass."""
        raise NotImplementedError
'''


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS * 3, vocab_size=300)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder ``tools`` with a module, a test, a generated file and one that does not parse."""
    root = tmp_path / "tools"
    (root / "tests").mkdir(parents=True)
    (root / "numbers.py").write_text(MODULE)
    (root / "tests" / "test_numbers.py").write_text(MODULE)
    (root / "made.py").write_text("# This file is auto-generated, do not edit\n" + MODULE)
    (root / "broken.py").write_text('def f(:\n    """Return nothing."""\n')
    return root
