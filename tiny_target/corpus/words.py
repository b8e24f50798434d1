"""Reads words.toml: words and wordings of the generated text, and names of packages."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path


@cache
def _tables() -> dict[str, dict]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def words(section: str) -> dict[str, tuple[str, ...]]:
    """Returns words or wordings by name of a section; white space separates the words of a text."""
    return {name: tuple(value.split() if isinstance(value, str) else value) for name, value in _tables()[section].items()}
