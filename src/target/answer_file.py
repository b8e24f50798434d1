"""Answers on disk: a JSON line a document, with ids (text would not always encode back to the same ids).

Lines are only ever appended, all of a conversation in one write; a line that a crash cut is dropped and made again. A document
without tokens says that its conversation has no answer, and ``left_out`` why.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from src.contracts import Conversation, Document
from src.corpus.lengths import named
from src.target.exchange import documents_of


def append_answers(path: Path, documents: Sequence[Document], left_out: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for d in documents:
        row = {"id": d.id, "domain": d.domain, "input_ids": d.input_ids.tolist(), "loss_mask": d.loss_mask.int().tolist()}
        lines.append(json.dumps(row | ({"left_out": left_out} if left_out else {})) + "\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


class Answers(dict[str, Document]):
    """Documents by id; ``left_out`` the reason of some that are empty."""

    left_out: dict[str, str]


def read_answers(path: Path, wanted: Collection[str] | None = None) -> Answers:
    """All of a file, or of the conversations ``wanted``; what a crash cut is taken off the file."""
    found, whole = Answers(), 0
    found.left_out = {}
    if not path.exists():
        return found
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None:
                break
            whole += len(line)
            if wanted is None or row["id"].partition("#")[0] in wanted:
                mask = torch.tensor(row["loss_mask"], dtype=torch.bool)
                found[row["id"]] = Document(row["id"], row["domain"], torch.tensor(row["input_ids"], dtype=torch.long), mask)
                if "left_out" in row:
                    found.left_out[row["id"]] = row["left_out"]
    if whole < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(whole)
    return found


def in_order(conversations: Sequence[Conversation], done: Answers) -> dict[str, list[Document]]:
    """Conversation id -> its documents that have an answer, in the order given."""
    return {c.id: [d for d in documents_of(c, done) if bool(d.loss_mask.any())] for c in conversations}


def tell_limits(
    conversations: Sequence[Conversation],
    found: Mapping[str, list[Document]],
    left_out: Mapping[str, str],
    *,
    max_new_tokens: int,
    max_length: int,
    eos_id: int,
) -> None:
    """One line each for prompts without an answer, by reason, and for answers that a limit ended."""
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
            f"max_length={max_length}, {turns - answers} later turns not asked",
            flush=True,
        )
