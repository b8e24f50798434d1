"""Reads a row of any chat form as a conversation: the one door between foreign data and this project.

1. form           the one of these fields that the row fills
                      messages, conversations     [{role, content}] or [{from, value}], or one list per field
                      instruction, output         with ``input`` on the line behind the instruction (Alpaca)
                      turns                       a benchmark's user turns: the first
2. messages       [{role, content}]; a ``system`` (or ``system_prompt``) field comes first; an assistant's
                  ``reasoning_content`` (``reasoning``, ``thinking``) becomes <think>{reasoning}</think> before its content
3. conversation   an optional system turn, then user and assistant in turn; the id is the hash of the turns

Any other row raises `MalformedRow`, whose message is the reason that the statistics count: it names the field that is not read.
Fields beside these (ids, categories, sources) do not change what a conversation says; `unread` names them for the statistics.
"""

import re
from collections.abc import Mapping, Sequence

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.stable_hash import content_hash

FORMS = ("messages", "conversations", "instruction", "turns")
_INSTRUCTION = ("input", "output")  # fields of the form ``instruction``
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SYSTEM = ("system", "system_prompt")
# Fields of a row or a message that change what an answer answers, or whether it is a good one.
_NOT_READ = (
    *("history", "context", "documents", "knowledge", "tools", "functions", "tool_calls", "function_call", "developer"),
    *("image", "images", "audio", "audios", "video", "videos", "rationale", "analysis", "chosen", "rejected"),
    *("retrieved", "passages", "thought", "reasoning_details", "refusal", "prefill", "suffix", "loss_mask"),
)
_SAID = ("role", "from", "content", "value")
_FLAGS = ("weight", "train", "label", "loss", "is_correct")  # 0 or false: not to train on
COLUMNS = (*FORMS, *_INSTRUCTION, *_SYSTEM, *_REASONING, *_NOT_READ, *_FLAGS)  # everything that ``parse_row`` reads
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_ROLES["developer"] = "system"  # OpenAI's later name


class MalformedRow(Exception):
    """A row that is not a conversation; the message is the reason that the statistics count."""


def parse_row(row: object, domain: str) -> Conversation:
    """Returns the conversation of a row; raises `MalformedRow` with the reason where it is none."""
    if not isinstance(row, Mapping):
        raise MalformedRow("row is not an object")
    turns = [_turn(message) for message in _messages(row)]
    if not turns:
        raise MalformedRow("no turns")
    if not alternate(turns):
        raise MalformedRow("roles do not alternate")
    whole = "\x00".join(f"{turn.role}\x01{turn.content}" for turn in turns)
    return Conversation(f"{domain}/{content_hash(whole)}", domain, tuple(turns))


def unread(row: Mapping) -> set[str]:
    """Returns the names of the fields of a row and its messages that ``parse_row`` ignores."""
    messages = next((row[form] for form in FORMS[:2] if isinstance(row.get(form), list)), ())
    found = {f"{name} of messages" for message in messages for name in message if name not in (*COLUMNS, *_SAID)}
    later = {"turns behind the first"} if isinstance(row.get("turns"), list) and len(row["turns"]) > 1 else set()
    return found | later | {name for name in row if name not in COLUMNS}


def alternate(turns: Sequence[Turn]) -> bool:
    """Tells whether turns are an optional system turn, then at least one of user and assistant in turn."""
    spoken = [turn.role for turn in turns[bool(turns) and turns[0].role == "system" :]]
    return bool(spoken) and spoken == (["user", "assistant"] * len(spoken))[: len(spoken)]


def _messages(row: Mapping) -> list[Mapping]:
    """Returns the messages of the one form that the row fills."""
    _refuse(row, _NOT_READ)
    given = [name for name in FORMS if row.get(name) is not None] or ["instruction"] * (row.get("output") is not None)
    forms = [name for name in given if _is_filled(row.get(name))] or given
    if not forms:
        raise MalformedRow("no known fields")
    if len(forms) > 1:
        raise MalformedRow(f"{forms[1]} beside {forms[0]}")
    (form,) = forms
    if form == "instruction":
        asked = _text(row.get("instruction"), "instruction")
        if _is_filled(row.get("input")):
            asked = f"{asked}\n{_text(row['input'], 'input')}"
        answer = {name: row.get(name) for name in _REASONING}
        answer |= {"role": "assistant", "content": _text(row.get("output"), "output")}
        messages = [{"role": "user", "content": asked}, answer]
    else:
        _refuse(row, (*_INSTRUCTION, *_REASONING))
        messages = _turns(row[form]) if form == "turns" else _chat(row[form], form)
    for name in _SYSTEM:
        if _is_filled(row.get(name)):
            if messages and _ROLES.get(messages[0].get("role", messages[0].get("from"))) == "system":
                raise MalformedRow(f"{name} beside a system message")
            messages = [{"role": "system", "content": _text(row[name], name)}, *messages]
    return messages


def _refuse(fields: Mapping, names: Sequence[str]) -> None:
    for name in names:
        if _is_filled(fields.get(name)):
            raise MalformedRow(f"{name} is not read")
    for name in _FLAGS:
        if fields.get(name) is False or (name == "weight" and fields.get(name) == 0):
            raise MalformedRow(f"{name}={fields[name]} is not read")


def _is_filled(value: object) -> bool:
    """A row of a table has all columns, so that an absent value can be null, an empty list or an empty text."""
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def _turns(turns: object) -> list[Mapping]:
    """Only the first turn: a benchmark's later questions follow the model's own answers, which no row has."""
    if not isinstance(turns, list):
        raise MalformedRow("turns is not a list")
    return [{"role": "user", "content": _text(turn, "turn")} for turn in turns[:1]]


def _chat(messages: object, form: str) -> list[Mapping]:
    if isinstance(messages, dict) and all(isinstance(column, list) for column in messages.values()):
        # `datasets` returns messages that the card declares as a sequence with one list per field.
        messages = [dict(zip(messages, message, strict=False)) for message in zip(*messages.values(), strict=False)]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise MalformedRow(f"{form} is not a list of messages")
    return messages


def _turn(message: Mapping) -> Turn:
    _refuse(message, _NOT_READ)
    # A Parquet row has all columns, so a key of the other schema can be present and empty.
    role = message.get("role") or message.get("from")
    if not isinstance(role, str) or role not in _ROLES:
        raise MalformedRow("missing or unknown role")
    role = _ROLES[role]
    content, value = message.get("content"), message.get("value")
    if _is_filled(content) and _is_filled(value) and content != value:
        raise MalformedRow("value beside content")
    content = _text(value if content is None else content, "content")
    if role == "assistant" and re.search("</?think>", content):
        content = content.lstrip()
        *before, answer = re.split("(</?think>)", content)
        if before[-1] == "<think>":
            raise MalformedRow("<think> is not closed")
        if before[:2] + before[3:] != ["", "<think>", "</think>"] or not answer.strip():
            raise MalformedRow("<think> or </think> inside an answer, or no answer behind it")
    for name in _REASONING:
        if _is_filled(message.get(name)):
            reasoning = _text(message[name], name)
            if role != "assistant" or content.startswith("<think>") or "</think>" in reasoning:
                raise MalformedRow(f"{name} of a {role} turn, or beside <think>")
            content = f"<think>{reasoning}</think>{content}"
    return Turn(role, content)


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


def to_row(conversation: Conversation, **more) -> dict:
    """Returns a conversation as a JSON row of this project's own files, with ``more`` fields between domain and turns."""
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    return {"id": conversation.id, "domain": conversation.domain, **more, "turns": turns}


def from_row(row: dict) -> Conversation:
    turns = tuple(Turn(turn["role"], turn["content"]) for turn in row["turns"])
    return Conversation(row["id"], row["domain"], turns)
