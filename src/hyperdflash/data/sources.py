"""Reads conversations from streamed hub data sets and from local JSONL, zstd-compressed JSONL and Parquet files.

Every row has a place (``rows.jsonl:12``, counted from 1). A row that hyperdflash.data.rows reads becomes a conversation; other
rows, damaged ones included, are dropped, and the statistics count them by reason and name their places. ValueError where the
rest of a source cannot be read.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from hyperdflash.contracts import DOMAINS, Conversation
from hyperdflash.data.row_stats import RowStats
from hyperdflash.data.rows import COLUMNS, MalformedRow, parse_row, unread
from hyperdflash.files import POINTER

# hub id -> domain
HUB_DATASETS = {"zhaode/EagleChat": "chat", "theblackcat102/evol-codealpaca-v1": "code"}
SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")
MAX_LINE_BYTES = 1_000_000
_BATCH_ROWS = 256


def is_row_file(source: str | Path) -> bool:
    return str(source).endswith(SUFFIXES)


def check_source(source: str | Path, domain: str | None) -> str:
    """Returns the domain of a source's rows; ValueError for a source that cannot be read."""
    if not is_row_file(source) and str(source) not in HUB_DATASETS:
        wanted = f"a {', '.join(SUFFIXES)} file or one of {', '.join(HUB_DATASETS)}"
        raise ValueError(f"source must be {wanted}, got {str(source)!r}")
    path = Path(source)
    if is_row_file(source) and not path.is_file():
        raise ValueError(f"no file at {source}; pass the path of a {', '.join(SUFFIXES)} file, one row per line")
    if is_row_file(source) and path.open("rb").read(len(POINTER)) == POINTER:
        raise ValueError(f"{source} is a pointer of Git LFS: fetch the file, by `git lfs pull`")
    domain = domain or HUB_DATASETS.get(str(source))
    if domain not in DOMAINS:
        raise ValueError(f"domain of {source} must be one of {', '.join(DOMAINS)}, got {domain!r}; pass domain=")
    return domain


def read_source(source: str | Path, domain: str | None, stats: RowStats) -> Iterator[Conversation]:
    """Yields the conversations of a hub data set (an id in ``HUB_DATASETS``) or of a local file, in the source's order.

    A file needs its ``domain``; ``stats`` receives the number of rows read, of malformed rows by reason, and ``unread``. One
    row is in memory at a time (256 rows of a Parquet file).
    """
    domain = check_source(source, domain)
    for place, row in _rows(source):
        stats.read += 1
        try:
            if isinstance(row, MalformedRow):
                raise row
            conversation = parse_row(row, domain)
            stats.unread = sorted(unread(row).union(stats.unread))
            yield conversation
        except MalformedRow as reason:
            stats.drop(str(reason), place)


def columns_of(source: str | Path) -> list[str]:
    """Returns the columns of a Parquet file, or the fields of another source's first row."""
    if str(source).endswith(".parquet"):
        return pq.read_schema(source).names
    return next((list(row) for _, row in _rows(source) if isinstance(row, dict)), [])


def _rows(source: str | Path) -> Iterator[tuple[str, object]]:
    """Yields (place, row or `MalformedRow`)."""
    place = "its start"
    try:
        for place, row in _file_rows(Path(source)) if is_row_file(source) else _hub_rows(str(source)):
            yield place, row
    except ModuleNotFoundError:
        raise
    except Exception as error:  # Arrow, the hub's client and its HTTP library raise many unrelated exceptions
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else 'no message'}"
        advice = (
            "it is cut or damaged, fetch it again"
            if is_row_file(source)
            else "run the same command again (it reads from the first row), or give a local copy as source"
        )
        if "too much memory" in reason:
            advice = "it was compressed with a window above 128 MiB, compress it again without --long and --ultra"
        raise ValueError(f"{source} cannot be read behind {place} ({reason}): {advice}") from None


def _hub_rows(source: str) -> Iterator[tuple[str, object]]:
    from datasets import load_dataset

    for number, row in enumerate(load_dataset(source, split="train", streaming=True), start=1):
        yield f"{source}:{number}", row


def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".zst":
        with pa.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as lines:
            yield from _json_rows(lines, path.name)
    else:
        with path.open("rb") as lines:
            yield from _json_rows(lines, path.name)


def _json_rows(file: BinaryIO, name: str) -> Iterator[tuple[str, object]]:
    """Yields one row per line that is not empty."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"{name}:{number}"
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):  # skip the rest, one piece at a time
                line = file.readline(MAX_LINE_BYTES)
            yield place, MalformedRow(f"line above {MAX_LINE_BYTES:,} bytes")
        elif line.strip():
            try:
                yield place, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield place, MalformedRow("invalid UTF-8")
            except (ValueError, RecursionError):
                yield place, MalformedRow("invalid JSON")


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the known columns of every row, and the names of the others."""
    with pq.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name in COLUMNS]
        others = dict.fromkeys(file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for row in _batch_rows(batch):
                number += 1
                yield f"{path.name}:{number}", {**others, **row} if isinstance(row, dict) else row


def _batch_rows(batch: pa.RecordBatch) -> list[object]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [MalformedRow("invalid UTF-8")]
        return [row for index in range(len(batch)) for row in _batch_rows(batch.slice(index, 1))]
