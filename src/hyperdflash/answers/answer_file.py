"""Answers on disk: one JSON line per document, with token ids, since text need not encode back to the same ids.

A writer appends all documents of a conversation in one write, the conversation's own id last. A reader changes nothing and
skips an incomplete last line, which another process can be writing; the next writer removes one that a crash left. A document
without tokens marks a conversation without an answer; ``left_out`` is the reason.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.exchange import AnswerSettings
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.prompts import named
from hyperdflash.data.tokenizer import special_ids

log = logging.getLogger(__name__)


class AnswerFile:
    """The answers in ``path`` to ``conversations``, or all of them (None): ``documents`` by id, and the reasons ``left_out`` by
    conversation.

    A damaged line counts as no answer, as does the rest of its conversation, and the next conversation where it was the last
    line of its own; a warning names it.
    """

    def __init__(self, path: Path, conversations: Sequence[Conversation] | None = None):
        self.path = path
        self.documents: dict[str, Document] = {}
        self.left_out: dict[str, str] = {}
        self._end: int | None = 0  # of the last whole line, in bytes; None once a line was appended
        wanted = None if conversations is None else {c.id for c in conversations}
        rows: list[dict | None] = []  # of one conversation; None for a damaged line
        with path.open("rb") if path.exists() else BytesIO() as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                self._end += len(line)
                rows.append(row := _row(line))
                if row is None:
                    log.warning("line %d of %s is damaged: its conversation will be answered again", number, path)
                elif "#" not in row["id"]:  # the last document of a conversation
                    if None not in rows and (wanted is None or row["id"] in wanted):
                        self._add(rows)
                    rows = []

    def _add(self, rows: Sequence[dict]) -> None:
        for row in rows:
            ids, mask = torch.tensor(row["input_ids"], dtype=torch.long), torch.tensor(row["loss_mask"], dtype=torch.bool)
            self.documents[row["id"]] = Document(row["id"], row["domain"], ids, mask)
            if "left_out" in row:
                self.left_out[row["id"]] = row["left_out"]

    def append(self, documents: Sequence[Document], left_out: str | None = None) -> None:
        """Appends the documents of whole conversations; only for the one process that writes the file, under its lock."""
        reason = {"left_out": left_out} if left_out else {}
        text = ""
        for d in documents:
            row = {"id": d.id, "domain": d.domain, "input_ids": d.input_ids.tolist(), "loss_mask": d.loss_mask.int().tolist()}
            text += json.dumps(row | reason) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self._end is not None:
                file.truncate(self._end)  # removes what a crash left of a line
                self._end = None
            file.write(text.encode())
        self.documents |= {document.id: document for document in documents}
        if left_out:
            self.left_out |= {document.id: left_out for document in documents}

    def missing(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Returns the conversations of which the file says nothing."""
        return [conversation for conversation in conversations if conversation.id not in self.documents]

    def answered(self, conversation: Conversation) -> list[Document]:
        """Returns the documents of one conversation that have an answer, in the order of `Exchange.documents`."""
        names = [*(f"{conversation.id}#{number}" for number in range(1, len(conversation.turns))), conversation.id]
        found = [self.documents[name] for name in names if name in self.documents]
        return [document for document in found if bool(document.loss_mask.any())]

    def ordered(
        self, conversations: Sequence[Conversation], settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase
    ) -> list[Document]:
        """Returns the documents in the order of ``conversations``.

        Prints one line per reason for prompts without an answer, and one for answers that a limit ended.
        """
        found = {conversation.id: self.answered(conversation) for conversation in conversations}
        without = defaultdict(list)
        for name in (name for name, documents in found.items() if not documents):
            without[self.left_out.get(name, f"no room for an answer within max_length={settings.max_length}")].append(name)
        for reason, names in without.items():
            print(f"target answers: {len(names)} of {len(conversations)} prompts left out, {reason}: {named(names)}")
        eos_id, answers, cut = special_ids(tokenizer, mask_id=0).eos, 0, 0
        for document in (document for documents in found.values() for document in documents):
            after = torch.cat([document.loss_mask[1:], torch.zeros(1, dtype=torch.bool)])
            ends = document.input_ids[document.loss_mask & ~after]
            answers, cut = answers + len(ends), cut + int((ends != eos_id).sum())
        turns = sum(turn.role == "user" for c in conversations if found[c.id] for turn in c.turns)
        if cut or answers < turns:
            limits = f"max_new_tokens={settings.max_new_tokens} or max_length={settings.max_length}"
            absent = f"{turns - answers} later turns without an answer"
            print(f"target answers: {cut} of {answers} end at {limits}, {absent}", flush=True)
        return [document for conversation in conversations for document in found[conversation.id]]


def _row(line: bytes) -> dict | None:
    """Parses a line of `AnswerFile.append`; returns None for any other line."""
    try:
        row = json.loads(line)
        whole = isinstance(row["id"], str) and isinstance(row["domain"], str) and len(row["input_ids"]) == len(row["loss_mask"])
    except (ValueError, TypeError, KeyError):
        return None
    return row if whole else None
