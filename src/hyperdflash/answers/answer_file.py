"""Answers on disk: one JSON line per document, with token ids, since text need not encode back to the same ids.

A writer appends all documents of a conversation in one write, the conversation's own id last. A reader changes nothing and
skips an incomplete last line, which another process can be writing; the next writer removes one that a crash left. A document
without tokens marks a conversation without an answer; ``left_out`` is the reason.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from hyperdflash.answers.exchange import documents_of
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.lengths import named

_BLOCK = 1 << 16  # bytes read at once, from the end backward


def append_answers(path: Path, documents: Sequence[Document], left_out: str | None = None) -> None:
    """Appends documents; only for the one process that writes the file, after `cut_half_line`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for d in documents:
        row = {"id": d.id, "domain": d.domain, "input_ids": d.input_ids.tolist(), "loss_mask": d.loss_mask.int().tolist()}
        lines.append(json.dumps(row | ({"left_out": left_out} if left_out else {})) + "\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def cut_half_line(path: Path) -> None:
    """Removes an incomplete last line that a crash left; only for the one process that writes the file, under its lock."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = whole = file.seek(0, os.SEEK_END)
        while whole:
            start = max(0, whole - _BLOCK)
            file.seek(start)
            newline = file.read(whole - start).rfind(b"\n")
            if newline >= 0:
                whole = start + newline + 1
                break
            whole = start
        if whole < size:
            file.truncate(whole)


class Answers(dict[str, Document]):
    """Documents by id; ``left_out`` gives the reason for empty documents where the file has one."""

    left_out: dict[str, str]


def read_answers(path: Path, wanted: Collection[str] | None = None) -> Answers:
    """Reads all documents of a file, or those of the conversations ``wanted``; ValueError for a damaged line."""
    found = Answers()
    found.left_out = {}
    if not path.exists():
        return found
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            row = _row(line)
            if row is None:
                last = _end_of_next_conversation(lines, number)
                raise ValueError(
                    f"line {number} of {path} is damaged: remove it and the conversation behind it, which may include it, "
                    f"with `sed -i {number},{last}d {path}`, and run the same command again; it makes only these answers again"
                )
            if wanted is None or row["id"].partition("#")[0] in wanted:
                mask = torch.tensor(row["loss_mask"], dtype=torch.bool)
                found[row["id"]] = Document(row["id"], row["domain"], torch.tensor(row["input_ids"], dtype=torch.long), mask)
                if "left_out" in row:
                    found.left_out[row["id"]] = row["left_out"]
    return found


def _row(line: bytes) -> dict | None:
    """Parses a line of `append_answers`; returns None for any other line."""
    try:
        row = json.loads(line)
        whole = isinstance(row["id"], str) and isinstance(row["domain"], str) and len(row["input_ids"]) == len(row["loss_mask"])
    except (ValueError, TypeError, KeyError):
        return None
    return row if whole else None


def _end_of_next_conversation(lines: BinaryIO, number: int) -> int:
    """Returns the number of the first line behind line ``number`` that ends a conversation.

    The damaged line can be an earlier document of that conversation, which is incomplete without it.
    """
    for line in lines:
        number += 1
        row = _row(line)
        if row is not None and "#" not in row["id"]:
            break
    return number


def in_order(conversations: Sequence[Conversation], done: Answers) -> dict[str, list[Document]]:
    """Returns the documents with an answer by conversation id, in the order of ``conversations``."""
    return {c.id: [d for d in documents_of(c, done) if bool(d.loss_mask.any())] for c in conversations}


def print_limits(
    conversations: Sequence[Conversation],
    found: Mapping[str, list[Document]],
    left_out: Mapping[str, str],
    *,
    max_new_tokens: int,
    max_length: int,
    eos_id: int,
) -> None:
    """Prints one line per reason for prompts without an answer, and one for answers that a limit ended."""
    without = defaultdict(list)
    for name, documents in found.items():
        if not documents:
            without[left_out.get(name, f"no room for an answer within max_length={max_length}")].append(name)
    for reason, names in without.items():
        print(f"target answers: {len(names)} of {len(conversations)} prompts left out, {reason}: {named(names)}")
    answers = cut = 0
    for document in (d for documents in found.values() for d in documents):
        after = torch.cat([document.loss_mask[1:], torch.zeros(1, dtype=torch.bool)])
        ends = document.input_ids[document.loss_mask & ~after]
        answers, cut = answers + len(ends), cut + int((ends != eos_id).sum())
    turns = sum(turn.role == "user" for c in conversations if found[c.id] for turn in c.turns)
    if cut or answers < turns:
        print(
            f"target answers: {cut} of {answers} end at max_new_tokens={max_new_tokens} or "
            f"max_length={max_length}, {turns - answers} later turns without an answer",
            flush=True,
        )
