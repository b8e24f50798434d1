"""Rows from elsewhere -> conversations: hub data sets by streaming, and local JSONL.

1. a row of any of three schemas: ``conversations: [{role, content}]``, ``instruction`` + ``output``, or ``turns``
   (user turns of a benchmark prompt)
2. a well-formed row -> ``Conversation`` with an id from its content
3. any other row is dropped, counted by reason and reported at the end of the stream
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from src.contracts import DOMAINS, Conversation, Turn
from src.corpus.stable_hash import content_hash

log = logging.getLogger(__name__)

# hub id -> domain of its rows
HUB_DATASETS = {"zhaode/EagleChat": "chat", "theblackcat102/evol-codealpaca-v1": "code"}

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class MalformedRow(Exception):
    """A row that is no conversation; the message is the reason it is counted under."""


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise MalformedRow(f"{what} is not text")
    if not value.strip():
        raise MalformedRow(f"empty {what}")
    if "\x00" in value:
        raise MalformedRow(f"NUL byte in {what}")
    return value


def _turns(row: dict) -> list[Turn]:
    if "conversations" in row:
        messages = row["conversations"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise MalformedRow("conversations is not a list of messages")
        if any(_ROLES.get(str(message.get("role"))) is None for message in messages):
            raise MalformedRow("missing or unknown role")
        return [Turn(_ROLES[message["role"]], _text(message.get("content"), "content")) for message in messages]
    if "instruction" in row or "output" in row:
        asked, answered = _text(row.get("instruction"), "instruction"), _text(row.get("output"), "output")
        return [Turn("user", asked), Turn("assistant", answered)]
    if "turns" in row:
        if not isinstance(row["turns"], list):
            raise MalformedRow("turns is not a list")
        # only the first: a benchmark's later questions follow the model's own answers, which no row holds
        return [Turn("user", _text(turn, "turn")) for turn in row["turns"][:1]]
    raise MalformedRow("no known fields")


def parse_row(row: object, domain: str) -> Conversation:
    """One row of any known schema; ``MalformedRow`` with the reason for anything else."""
    if not isinstance(row, dict):
        raise MalformedRow("row is not an object")
    turns = _turns(row)
    spoken = [turn.role for turn in turns[1:]] if turns and turns[0].role == "system" else [turn.role for turn in turns]
    if not spoken:
        raise MalformedRow("no turns")
    if spoken != (["user", "assistant"] * len(spoken))[: len(spoken)]:
        raise MalformedRow("roles do not alternate")
    whole = "\x00".join(f"{turn.role}\x01{turn.content}" for turn in turns)
    return Conversation(f"{domain}/{content_hash(whole)}", domain, tuple(turns))


def _json_lines(path: Path) -> Iterator[object]:
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except (UnicodeDecodeError, ValueError, RecursionError) as error:
                    yield MalformedRow("invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "invalid JSON")


def _hub_rows(source: str) -> Iterable[object]:
    from datasets import load_dataset

    return load_dataset(source, split="train", streaming=True)


def stream(
    source: str | Path, domain: str | None = None, *, limit: int | None = None, drops: Counter | None = None
) -> Iterator[Conversation]:
    """Conversations of a hub data set (an id in ``HUB_DATASETS``) or of a local ``.jsonl`` file, in the source's order.

    ``domain`` is required for a file; ``limit`` is the number of conversations at most; ``drops`` receives the number
    of malformed rows by reason (they are also logged when the stream ends).
    """
    is_file = str(source).endswith(".jsonl")
    if not is_file and str(source) not in HUB_DATASETS:
        raise ValueError(f"source must be a .jsonl file or one of {', '.join(HUB_DATASETS)}, got {str(source)!r}")
    if is_file and not Path(source).is_file():
        raise ValueError(f"no file at {source}; pass the path of a .jsonl file, one row a line")
    domain = domain or HUB_DATASETS.get(str(source))
    if domain not in DOMAINS:
        raise ValueError(f"domain of {source} must be one of {', '.join(DOMAINS)}, got {domain!r}; pass domain=")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 conversation or None, got {limit}")
    rows = _json_lines(Path(source)) if is_file else _hub_rows(str(source))
    return _parsed(rows, str(source), domain, limit, drops if drops is not None else Counter())


def _parsed(rows: Iterable[object], source: str, domain: str, limit: int | None, drops: Counter) -> Iterator[Conversation]:
    count = 0
    try:
        for row in rows:
            try:
                if isinstance(row, MalformedRow):
                    raise row
                conversation = parse_row(row, domain)
            except MalformedRow as reason:
                drops[str(reason)] += 1
                continue
            yield conversation
            count += 1
            if count == limit:
                break
    finally:
        if drops:
            told = ", ".join(f"{number} {reason}" for reason, number in drops.most_common())
            log.warning("%s: %d conversations read, %d rows dropped: %s", source, count, sum(drops.values()), told)
