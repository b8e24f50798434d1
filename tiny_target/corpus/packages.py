"""Lists the Python files that the embedded corpus reads: the standard library and this project's dependencies, by name.

The list is fixed, so that other packages of the environment change nothing. A listed distribution that is not installed is left
out, and the cache key records it.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tiny_target.corpus.words import words

_WORDS = words("packages")
_ENTRIES = (entry.partition("=") for entry in _WORDS["distributions"])
DISTRIBUTIONS = {name: (folders or name).split("+") for name, _, folders in _ENTRIES}  # -> folders of site-packages
_SKIPPED_FOLDERS = frozenset(_WORDS["skipped_folders"])


@dataclass(frozen=True)
class SourceFile:
    """A Python file and its dotted module name."""

    path: Path
    module: str


def python_files(root: Path, prefix: str = "") -> Iterator[SourceFile]:
    """Yields files below ``root`` in sorted order; ``prefix`` is the dotted name of ``root`` ("" for the standard library)."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            if not name.endswith(".py") or name.startswith("test_") or name.endswith(("_test.py", "_tests.py", "_pb2.py")):
                continue
            path = Path(folder, name)
            parts = [part for part in path.relative_to(root).with_suffix("").parts if part != "__init__"]
            module = ".".join([prefix, *parts] if prefix else parts)
            if module:
                yield SourceFile(path, module)


def installed_versions() -> dict[str, str]:
    """Returns the version of every listed distribution, "missing" where it is not installed."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def corpus_files() -> list[SourceFile]:
    """Returns every file of the embedded corpus, the standard library first."""
    paths = sysconfig.get_paths()
    roots = [(Path(paths["purelib"], folder), folder) for folders in DISTRIBUTIONS.values() for folder in folders]
    return [file for root, prefix in [(Path(paths["stdlib"]), ""), *roots] for file in python_files(root, prefix)]
