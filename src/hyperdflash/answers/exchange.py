"""Answers one conversation turn by turn: returns the next prompt, takes its answer, and makes the documents.

Each prompt holds the history with the earlier answers. In non_think all turns are one document. In think_high each turn is one,
since reasoning leaves the history: the last has the conversation's id, earlier ones ``<id>#1``, ``<id>#2``, ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.chat import Mode, encode_rounds, history_after
from hyperdflash.data.tokenizer import special_ids

_LEAST_ROOM = 2  # tokens behind a prompt: one supervised pair


class Exchange:
    """Call ``prompt`` and ``add`` in turn until ``prompt`` returns None, then ``documents`` (``max_length`` tokens each)."""

    def __init__(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, mode: Mode, max_length: int):
        self.conversation = conversation
        self._tokenizer, self._mode, self._max_length = tokenizer, mode, max_length
        self._eos_id = special_ids(tokenizer, mask_id=0).eos
        self._rounds = encode_rounds(conversation, tokenizer, mode)
        # (ids, loss mask) per text: non_think extends the only one, think_high adds one per turn
        self._texts: list[tuple[list[int], list[bool]]] = []
        self._history: tuple[list[int], list[bool]] = ([], [])

    def prompt(self) -> list[int] | None:
        """Returns the ids of history and next user turn; None behind the last turn, or where no answer has room."""
        if not self._rounds:
            return None
        prompt = self._history[0] + self._rounds[0]
        if len(prompt) + _LEAST_ROOM > self._max_length:
            self._rounds.clear()
            return None
        return prompt

    def add(self, answer: Sequence[int]) -> None:
        """Takes the answer to ``prompt``, cut at ``max_length``; an answer without an end token ends the conversation."""
        prompt = self._history[0] + self._rounds.pop(0)
        answer = list(answer)[: self._max_length - len(prompt)]
        mask = self._history[1]
        mask = [*mask, *[False] * (len(prompt) - len(mask)), *[True] * len(answer)]
        seen = history_after(prompt, answer, self._tokenizer, self._mode)
        if self._mode == "think_high":
            self._texts.append((prompt + answer, mask))
            self._history = seen, [False] * len(seen)
        else:
            self._texts = [(prompt + answer, mask)]
            self._history = seen, mask
        if answer[-1] != self._eos_id:
            self._rounds.clear()

    def documents(self) -> list[Document]:
        """Returns the documents, the one with the conversation's id last; one empty document where no turn has an answer."""
        *earlier, last = self._texts or [([], [])]
        named = [(f"{self.conversation.id}#{number}", *text) for number, text in enumerate(earlier, start=1)]
        return [
            Document(name, self.conversation.domain, torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.bool))
            for name, ids, mask in (*named, (self.conversation.id, *last))
        ]
