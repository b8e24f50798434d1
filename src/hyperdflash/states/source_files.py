"""The local files that a dataset was prepared from: recorded while it is prepared, compared whenever a training opens it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path


def record_files(paths: Iterable[str | Path]) -> dict[str, dict]:
    """Path -> ``size`` in bytes, ``mtime_ns`` and ``sha256`` of the content; reads every file once."""
    return {str(path): {**_status(Path(path)), "sha256": _sha256(Path(path))} for path in paths}


def check_files(recorded: Mapping[str, Mapping], remedy: str) -> None:
    """ValueError when a file that still exists has another content than recorded; the sentence ends with ``remedy``.

    Reads a file only when its size or modification time differs. A missing file is accepted.
    """
    for name, before in recorded.items():
        path = Path(name)
        if not path.exists() or _status(path).items() <= before.items():
            continue
        if _sha256(path) != before["sha256"]:
            raise ValueError(f"{path} was edited after its rows were prepared: {remedy}")


def _status(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
