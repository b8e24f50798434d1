"""Finds the files of this project, and writes a file whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Opens a binary file that appears under ``path`` when the block ends, and leaves nothing behind when the block fails.

    When several processes write ``path`` at once, the last wins and none fails. ``sync`` forces the bytes to the disk first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """Returns the folder ``conf`` or ``assets``: the copy that a wheel installs in the package, else the repository's."""
    installed = PACKAGE / name
    return installed if installed.exists() else PACKAGE.parents[1] / name


def asset(name: str) -> str:
    """Returns the path of ``assets/name``, relative to the current folder when it lies below it, else absolute."""
    path = resource("assets") / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def portable(path: str) -> str:
    """Returns a shipped asset's path as ``assets/NAME``, wherever the project lies, and any other path as it is."""
    assets, whole = resource("assets"), Path(path).resolve()
    return f"assets/{whole.relative_to(assets)}" if whole.is_relative_to(assets) else path


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` in UTF-8, as `whole_file` does."""
    with whole_file(path) as file:
        file.write(text.encode())
