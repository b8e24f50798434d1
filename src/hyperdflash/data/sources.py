"""Reads conversations from streamed hub data sets and from local JSONL, JSONL.zst and Parquet files.

A well-formed row (hyperdflash.data.rows) becomes a conversation; other rows are dropped, and the statistics count them by
reason and name their places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from hyperdflash.contracts import DOMAINS, Conversation
from hyperdflash.data.row_files import SUFFIXES, file_rows, is_row_file
from hyperdflash.data.row_stats import RowStats
from hyperdflash.data.rows import MalformedRow, parse_row

# hub id -> domain
HUB_DATASETS = {"zhaode/EagleChat": "chat", "theblackcat102/evol-codealpaca-v1": "code"}


def check_source(source: str | Path, domain: str | None) -> str:
    """Returns the domain of a source's rows; ValueError for a source that cannot be read."""
    if not is_row_file(source) and str(source) not in HUB_DATASETS:
        raise ValueError(
            f"source must be a {', '.join(SUFFIXES)} file or one of {', '.join(HUB_DATASETS)}, got {str(source)!r}"
        )
    if is_row_file(source) and not Path(source).is_file():
        raise ValueError(f"no file at {source}; pass the path of a {', '.join(SUFFIXES)} file, one row per line")
    domain = domain or HUB_DATASETS.get(str(source))
    if domain not in DOMAINS:
        raise ValueError(f"domain of {source} must be one of {', '.join(DOMAINS)}, got {domain!r}; pass domain=")
    return domain


def _hub_rows(source: str) -> Iterator[tuple[str, object]]:
    """Yields the rows of a hub data set; ValueError where ``datasets`` gives up after its own retries."""
    from datasets import load_dataset

    number = 0
    try:
        for number, row in enumerate(load_dataset(source, split="train", streaming=True), start=1):
            yield f"{source}:{number}", row
    except Exception as error:  # the hub's client, its HTTP library and Arrow raise many unrelated exceptions
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else 'no message'}"
        raise ValueError(
            f"the stream of {source} ended behind row {number:,} ({reason}): run the same command again (it reads from the "
            "first row), or give a local copy as source"
        ) from error


def stream(source: str | Path, domain: str | None = None, *, stats: RowStats | None = None) -> Iterator[Conversation]:
    """Yields the conversations of a hub data set (an id in ``HUB_DATASETS``) or of a local file, in the source's order.

    A file needs its ``domain``; ``stats`` receives the number of rows read and of malformed rows by reason. One row is in
    memory at a time (256 rows of a Parquet file).
    """
    return (conversation for _, conversation in placed(source, domain, stats=stats or RowStats(str(source))))


def placed(source: str | Path, domain: str | None = None, *, stats: RowStats) -> Iterator[tuple[str, Conversation]]:
    """Yields what ``stream`` yields with each row's place: ``rows.jsonl:12``."""
    domain = check_source(source, domain)
    return _parsed(file_rows(source) if is_row_file(source) else _hub_rows(str(source)), domain, stats)


def _parsed(rows: Iterable[tuple[str, object]], domain: str, stats: RowStats) -> Iterator[tuple[str, Conversation]]:
    for place, row in rows:
        stats.read += 1
        try:
            if isinstance(row, MalformedRow):
                raise row
            conversation = parse_row(row, domain)
        except MalformedRow as reason:
            stats.drop(str(reason), place)
        else:
            yield place, conversation
