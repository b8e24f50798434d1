"""Answers on disk: one JSON line per document, with token ids, since text need not encode back to the same ids.

A writer appends all documents of a conversation in one write, the conversation's own id last. A reader changes nothing and
skips an incomplete last line, which another process can be writing; the next writer removes one that a crash left. A document
without tokens marks a conversation whose prompt leaves no room for an answer.
"""

import json
import logging
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
    """The answers in ``path``: ``documents`` by id. A damaged line counts as no answer, as does the rest of its conversation,
    and the next conversation where it was the last line of its own; a warning names it."""

    def __init__(self, path: Path):
        self.path = path
        self.documents: dict[str, Document] = {}
        self._end: int | None = 0  # of the last whole line, in bytes; None once a line was appended
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
                    if None not in rows:
                        self.documents |= {row["id"]: _document(row) for row in rows}
                    rows = []

    def append(self, documents: Sequence[Document]) -> None:
        """Appends the documents of whole conversations; only for the one process that writes the file, under its lock."""
        text = ""
        for d in documents:
            row = {"id": d.id, "domain": d.domain, "input_ids": d.input_ids.tolist(), "loss_mask": d.loss_mask.int().tolist()}
            text += json.dumps(row) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self._end is not None:
                file.truncate(self._end)  # removes what a crash left of a line
                self._end = None
            file.write(text.encode())
        self.documents |= {document.id: document for document in documents}

    def missing(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        return [conversation for conversation in conversations if conversation.id not in self.documents]

    def ordered(
        self, conversations: Sequence[Conversation], settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase
    ) -> list[Document]:
        """Returns the documents in the order of ``conversations``. Prints one line for prompts without an answer, and one for
        answers that a limit ended."""
        print(f"target answers: all {len(conversations):,} are in {self.path}", flush=True)
        found: dict[str, list[Document]] = {}
        for c in conversations:
            names = [*(f"{c.id}#{number}" for number in range(1, len(c.turns))), c.id]
            own = [self.documents[name] for name in names if name in self.documents]
            found[c.id] = [document for document in own if bool(document.loss_mask.any())]
        if without := [name for name, documents in found.items() if not documents]:
            limit = f"no room for an answer within max_length={settings.max_length}"
            print(f"target answers: {len(without)} of {len(conversations)} prompts left out, {limit}: {named(without)}")
        eos_id = special_ids(tokenizer, mask_id=0).eos
        cut = [name for name, documents in found.items() if documents and int(documents[-1].input_ids[-1]) != eos_id]
        if cut:
            limits = f"max_new_tokens={settings.max_new_tokens} or max_length={settings.max_length}"
            print(f"target answers: {len(cut)} of {len(conversations)} end at {limits}: {named(cut)}", flush=True)
        return [document for documents in found.values() for document in documents]


def _row(line: bytes) -> dict | None:
    """Parses a line of `AnswerFile.append`; returns None for any other line."""
    try:
        row = json.loads(line)
        whole = isinstance(row["id"], str) and isinstance(row["domain"], str) and len(row["input_ids"]) == len(row["loss_mask"])
    except (ValueError, TypeError, KeyError):
        return None
    return row if whole else None


def _document(row: dict) -> Document:
    ids, mask = torch.tensor(row["input_ids"], dtype=torch.long), torch.tensor(row["loss_mask"], dtype=torch.bool)
    return Document(row["id"], row["domain"], ids, mask)
