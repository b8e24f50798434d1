"""Measurements on disk, one JSON object a line: what a run took, written once, rendered as often as wanted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, TypeVar

from hyperdflash.files import write_text


class Record(Protocol):
    """A dataclass that becomes plain JSON values and comes back equal."""

    def to_record(self) -> dict: ...

    @classmethod
    def from_record(cls, record: dict) -> Self: ...


R = TypeVar("R", bound=Record)
AUTOREGRESSIVE = "AR"  # what every record calls the target's plain decoding in this project's own loop


def write_records(path: Path | str, records: Sequence[Record]) -> Path:
    """Replaces the file at ``path``, at once."""
    path = Path(path)
    write_text(path, "".join(json.dumps(record.to_record(), allow_nan=False) + "\n" for record in records))
    return path


def read_records(path: Path | str, kind: type[R]) -> list[R]:
    """What ``write_records`` wrote, in its order."""
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            found.append(kind.from_record(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} is no {kind.__name__} ({type(error).__name__}: {error}): measure again, or drop it"
            ) from error
    return found
