"""Reads the rows of a local JSONL, zstd-compressed JSONL or Parquet file, damaged rows included.

Every row has a place (``rows.jsonl:12``, counted from 1). A row that cannot be read is yielded as a ``MalformedRow``, and the
next row follows; ValueError where the rest of the file cannot be read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from hyperdflash.data.rows import COLUMNS, MalformedRow

MAX_LINE_BYTES = 1_000_000
SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")
_BATCH_ROWS = 256


def is_row_file(source: str | Path) -> bool:
    return str(source).endswith(SUFFIXES)


def file_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yields (place, row or ``MalformedRow``) in the file's order, with one batch of rows in memory at a time."""
    path = Path(path)
    read = parquet_rows if path.suffix == ".parquet" else json_rows
    place = "its start"
    try:
        for place, row in read(path):
            yield place, row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read behind {place} ({reason}): it is cut or damaged, fetch it again") from None


def json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yields one row per line that is not empty."""
    if path.suffix == ".zst":
        with pa.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as lines:
            yield from _parsed_lines(lines, path.name)
    else:
        with path.open("rb") as lines:
            yield from _parsed_lines(lines, path.name)


def _parsed_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, object]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"{name}:{number}"
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):  # skip the rest, one piece at a time
                line = file.readline(MAX_LINE_BYTES)
            yield place, MalformedRow(f"line above {MAX_LINE_BYTES:,} bytes")
        elif line.strip():
            yield place, _parsed_line(line)


def _parsed_line(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return MalformedRow("invalid UTF-8")
    except (ValueError, RecursionError):
        return MalformedRow("invalid JSON")


def parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the known columns of every row."""
    with pq.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name in COLUMNS]
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for row in _parsed_batch(batch):
                number += 1
                yield f"{path.name}:{number}", row


def _parsed_batch(batch: pa.RecordBatch) -> list[object]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [row for index in range(len(batch)) for row in _parsed_row(batch.slice(index, 1))]


def _parsed_row(batch: pa.RecordBatch) -> list[object]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [MalformedRow("invalid UTF-8")]
