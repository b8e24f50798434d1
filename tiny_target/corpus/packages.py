"""Which Python files the embedded corpus reads: the standard library and this project's own dependencies, by name.

The list is fixed so that another package in the environment changes nothing. A listed distribution that is missing
is left out, and the cache key says so.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# distribution -> the folders it installs into site-packages
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "safetensors": ("safetensors",),
    "numpy": ("numpy",),
    "sympy": ("sympy",),
    "mpmath": ("mpmath",),
    "networkx": ("networkx",),
    "pandas": ("pandas",),
    "pyarrow": ("pyarrow",),
    "python-dateutil": ("dateutil",),
    "lightning": ("lightning",),
    "lightning-utilities": ("lightning_utilities",),
    "torchmetrics": ("torchmetrics",),
    "datasets": ("datasets",),
    "huggingface-hub": ("huggingface_hub",),
    "dill": ("dill",),
    "filelock": ("filelock",),
    "fsspec": ("fsspec",),
    "aiohttp": ("aiohttp",),
    "yarl": ("yarl",),
    "multidict": ("multidict",),
    "anyio": ("anyio",),
    "httpx": ("httpx",),
    "httpcore": ("httpcore",),
    "requests": ("requests",),
    "urllib3": ("urllib3",),
    "idna": ("idna",),
    "charset-normalizer": ("charset_normalizer",),
    "hydra-core": ("hydra",),
    "omegaconf": ("omegaconf",),
    "PyYAML": ("yaml",),
    "wandb": ("wandb",),
    "click": ("click",),
    "pydantic": ("pydantic",),
    "platformdirs": ("platformdirs",),
    "packaging": ("packaging",),
    "psutil": ("psutil",),
    "matplotlib": ("matplotlib", "mpl_toolkits"),
    "fonttools": ("fontTools",),
    "pillow": ("PIL",),
    "cycler": ("cycler",),
    "contourpy": ("contourpy",),
    "pyparsing": ("pyparsing",),
    "rich": ("rich",),
    "Pygments": ("pygments",),
    "markdown-it-py": ("markdown_it",),
    "tqdm": ("tqdm",),
    "Jinja2": ("jinja2",),
    "MarkupSafe": ("markupsafe",),
    "setuptools": ("setuptools", "pkg_resources"),
    "attrs": ("attr",),
}

_SKIPPED_FOLDERS_TEXT = """
test tests testing _testing idlelib lib2to3 turtledemo ensurepip distutils _distutils pydoc_data site-packages
_vendor vendor _vendored vendored thirdparty third_party external _extern proto _antlr antlr generated _generated
__pycache__ node_modules benchmarks _pyinstaller
"""
_SKIPPED_FOLDERS = frozenset(_SKIPPED_FOLDERS_TEXT.split())


@dataclass(frozen=True)
class SourceFile:
    """A Python file and the dotted module it is imported as."""

    path: Path
    module: str


def python_files(root: Path, prefix: str = "") -> Iterator[SourceFile]:
    """Files below ``root`` in sorted order; ``prefix`` is the dotted name of ``root`` ("" for the standard library)."""
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
    """Version of every listed distribution, "missing" where it is not installed."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def corpus_files() -> list[SourceFile]:
    """Every file the embedded corpus is built from, standard library first."""
    files = list(python_files(Path(sysconfig.get_paths()["stdlib"])))
    site = Path(sysconfig.get_paths()["purelib"])
    for folders in DISTRIBUTIONS.values():
        for folder in folders:
            if (site / folder).is_dir():
                files.extend(python_files(site / folder, folder))
    return files
