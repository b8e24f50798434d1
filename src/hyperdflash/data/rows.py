"""Converts rows to conversations and back.

1. a row with ``conversations: [{role, content}]`` (or ShareGPT's ``{from, value}``), with ``instruction`` and ``output``, or
   with ``turns`` (a benchmark's user turns) -> ``Conversation``, whose id is the hash of its turns
2. any other row -> ``MalformedRow``, whose message is the reason that the statistics count
3. ``Conversation`` <-> the JSON row of this project's own files: ``id``, ``domain``, ``turns: [{role, content}]``
"""

from __future__ import annotations

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.stable_hash import content_hash

COLUMNS = ("conversations", "instruction", "output", "turns")  # everything that ``parse_row`` reads


class MalformedRow(Exception):
    """A row that is not a conversation; the message is the reason that the statistics count."""


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
    # A Parquet row has all columns, so a key of the other schema can be present and empty.
    role = message.get("role") or message.get("from")
    if not isinstance(role, str) or role not in _ROLES:
        raise MalformedRow("missing or unknown role")
    content = message.get("content")
    return Turn(_ROLES[role], _text(message.get("value") if content is None else content, "content"))


def _turns(row: dict) -> list[Turn]:
    if row.get("conversations") is not None:
        messages = row["conversations"]
        if isinstance(messages, dict) and all(isinstance(column, list) for column in messages.values()):
            # `datasets` returns messages that the card declares as a sequence with one list per field.
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
        # Only the first: a benchmark's later questions follow the model's own answers, which no row has.
        return [Turn("user", _text(turn, "turn")) for turn in row["turns"][:1]]
    raise MalformedRow("no known fields")


def parse_row(row: object, domain: str) -> Conversation:
    """Parses a row of any known schema; raises ``MalformedRow`` with the reason for other rows."""
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


def to_row(conversation: Conversation, **more) -> dict:
    """Returns a conversation as a JSON row, with ``more`` fields between its domain and its turns."""
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    return {"id": conversation.id, "domain": conversation.domain, **more, "turns": turns}


def from_row(row: dict) -> Conversation:
    """Parses what ``to_row`` returns."""
    turns = tuple(Turn(turn["role"], turn["content"]) for turn in row["turns"])
    return Conversation(row["id"], row["domain"], turns)
