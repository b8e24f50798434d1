"""Rows from elsewhere -> conversations: hub data sets by streaming, and local JSONL, JSONL.zst and Parquet files.

1. a row of any of these schemas: ``conversations: [{role, content}]`` (or ``{from, value}``, as ShareGPT has them),
   ``instruction`` + ``output``, or ``turns`` (user turns of a benchmark prompt)
2. a well-formed row -> ``Conversation`` with an id from its content
3. any other row is dropped, counted by reason and named by its place
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from hyperdflash.contracts import DOMAINS, Conversation, Turn
from hyperdflash.data.row_files import SUFFIXES, MalformedRow, file_rows, is_row_file
from hyperdflash.data.row_stats import Account
from hyperdflash.data.stable_hash import content_hash

# hub id -> domain of its rows
HUB_DATASETS = {"zhaode/EagleChat": "chat", "theblackcat102/evol-codealpaca-v1": "code"}

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise MalformedRow(f"{what} is not text")
    if not value.strip():
        raise MalformedRow(f"empty {what}")
    if "\x00" in value:
        raise MalformedRow(f"NUL byte in {what}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell one: "\ud800"
        raise MalformedRow(f"half a surrogate pair in {what}") from None
    return value


def _turn(message: dict) -> Turn:
    # Parquet has all columns in every row, so a key of the other schema may be there and empty
    role = message.get("role") or message.get("from")
    if not isinstance(role, str) or role not in _ROLES:
        raise MalformedRow("missing or unknown role")
    content = message.get("content")
    return Turn(_ROLES[role], _text(message.get("value") if content is None else content, "content"))


def _turns(row: dict) -> list[Turn]:
    if row.get("conversations") is not None:
        messages = row["conversations"]
        if isinstance(messages, dict) and all(isinstance(column, list) for column in messages.values()):
            # how `datasets` gives a list of messages whose card calls it a sequence: a list a field
            messages = [dict(zip(messages, message, strict=False)) for message in zip(*messages.values(), strict=False)]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise MalformedRow("conversations is not a list of messages")
        return [_turn(message) for message in messages]
    if row.get("instruction") is not None or row.get("output") is not None:
        asked, answered = _text(row.get("instruction"), "instruction"), _text(row.get("output"), "output")
        return [Turn("user", asked), Turn("assistant", answered)]
    if row.get("turns") is not None:
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


def check_source(source: str | Path, domain: str | None) -> str:
    """The domain of a source's rows; ValueError for one that cannot be read."""
    if not is_row_file(source) and str(source) not in HUB_DATASETS:
        raise ValueError(
            f"source must be a {', '.join(SUFFIXES)} file or one of {', '.join(HUB_DATASETS)}, got {str(source)!r}"
        )
    if is_row_file(source) and not Path(source).is_file():
        raise ValueError(f"no file at {source}; pass the path of a {', '.join(SUFFIXES)} file, one row a line")
    domain = domain or HUB_DATASETS.get(str(source))
    if domain not in DOMAINS:
        raise ValueError(f"domain of {source} must be one of {', '.join(DOMAINS)}, got {domain!r}; pass domain=")
    return domain


def _hub_rows(source: str) -> Iterator[tuple[str, object]]:
    """``datasets`` tries a failing read again by itself; what it gives up on ends the stream in one sentence."""
    from datasets import load_dataset

    number = 0
    try:
        for number, row in enumerate(load_dataset(source, split="train", streaming=True), start=1):
            yield f"{source}:{number}", row
    except Exception as error:  # the hub's client, its HTTP library and Arrow raise a dozen unrelated kinds
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else 'no message'}"
        raise ValueError(
            f"the stream of {source} ended behind row {number:,} ({reason}): run the same command again (it reads from the "
            "first row), or give a local copy as source"
        ) from error


def stream(source: str | Path, domain: str | None = None, *, account: Account | None = None) -> Iterator[Conversation]:
    """Conversations of a hub data set (an id in ``HUB_DATASETS``) or of a local file, in the source's order.

    ``domain`` is required for a file; ``account`` receives the number of rows read and the malformed ones by reason. A row
    is in memory at a time (a batch of 256 of a Parquet file).
    """
    return (conversation for _, conversation in placed(source, domain, account=account or Account(str(source))))


def placed(source: str | Path, domain: str | None = None, *, account: Account) -> Iterator[tuple[str, Conversation]]:
    """The same with each row's place: ``rows.jsonl:12``."""
    domain = check_source(source, domain)
    return _parsed(file_rows(source) if is_row_file(source) else _hub_rows(str(source)), domain, account)


def _parsed(rows: Iterable[tuple[str, object]], domain: str, account: Account) -> Iterator[tuple[str, Conversation]]:
    for place, row in rows:
        account.read += 1
        try:
            if isinstance(row, MalformedRow):
                raise row
            conversation = parse_row(row, domain)
        except MalformedRow as reason:
            account.drop(str(reason), place)
        else:
            yield place, conversation
