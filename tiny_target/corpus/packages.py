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

# Distributions; behind "=" the folders of site-packages that a distribution installs under other names.
_DISTRIBUTIONS_TEXT = """
torch transformers tokenizers safetensors numpy sympy mpmath networkx pandas pyarrow python-dateutil=dateutil lightning
lightning-utilities=lightning_utilities torchmetrics datasets huggingface-hub=huggingface_hub dill filelock fsspec
aiohttp yarl multidict anyio httpx httpcore requests urllib3 idna charset-normalizer=charset_normalizer hydra-core=hydra
omegaconf PyYAML=yaml wandb click pydantic platformdirs packaging psutil matplotlib=matplotlib+mpl_toolkits
fonttools=fontTools pillow=PIL cycler contourpy pyparsing rich Pygments=pygments markdown-it-py=markdown_it tqdm
Jinja2=jinja2 MarkupSafe=markupsafe setuptools=setuptools+pkg_resources attrs=attr
"""


def _folders(entry: str) -> tuple[str, tuple[str, ...]]:
    name, _, folders = entry.partition("=")
    return name, tuple((folders or name).split("+"))


DISTRIBUTIONS: dict[str, tuple[str, ...]] = dict(map(_folders, _DISTRIBUTIONS_TEXT.split()))

_SKIPPED_FOLDERS_TEXT = """
test tests testing _testing idlelib lib2to3 turtledemo ensurepip distutils _distutils pydoc_data site-packages
_vendor vendor _vendored vendored thirdparty third_party external _extern proto _antlr antlr generated _generated
__pycache__ node_modules benchmarks _pyinstaller
"""
_SKIPPED_FOLDERS = frozenset(_SKIPPED_FOLDERS_TEXT.split())


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
    files = list(python_files(Path(sysconfig.get_paths()["stdlib"])))
    site = Path(sysconfig.get_paths()["purelib"])
    for folders in DISTRIBUTIONS.values():
        for folder in folders:
            if (site / folder).is_dir():
                files.extend(python_files(site / folder, folder))
    return files
