"""One conversation answered turn by turn, whoever answers: what is asked next, and the documents that come out.

Each answer is given on the history that earlier answers made. In non_think all turns are one text; in think_high one a turn,
since reasoning leaves the history: the last turn's document has the conversation's id, earlier ones ``<id>#1``, ``<id>#2``, ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.chat import encode_rounds, without_reasoning
from hyperdflash.data.tokenizer import special_ids

_LEAST_ROOM = 2  # tokens after a prompt: one supervised pair


class Exchange:
    """``prompt`` and ``add`` in turn until ``prompt`` is None, then ``documents``; ``max_length`` tokens a document."""

    def __init__(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, mode: str, max_length: int):
        self.conversation = conversation
        self._tokenizer, self._mode, self._max_length = tokenizer, mode, max_length
        self._eos_id = special_ids(tokenizer, mask_id=0).eos
        self._rounds = encode_rounds(conversation, tokenizer, mode)
        # texts are (ids, loss mask); the last one grows, or in think_high is followed by the next turn's
        self._texts: list[tuple[list[int], list[bool]]] = []
        self._history: tuple[list[int], list[bool]] = ([], [])

    def prompt(self) -> list[int] | None:
        """History and next user turn; None after the last one, or where no answer has room."""
        if not self._rounds:
            return None
        prompt = self._history[0] + self._rounds[0]
        if len(prompt) + _LEAST_ROOM > self._max_length:
            self._rounds.clear()
            return None
        return prompt

    def add(self, answer: Sequence[int]) -> None:
        """The answer to ``prompt``; cut at ``max_length``. After one that has no end token nothing can follow."""
        prompt = self._history[0] + self._rounds.pop(0)
        answer = list(answer)[: self._max_length - len(prompt)]
        mask = self._history[1]
        mask = [*mask, *[False] * (len(prompt) - len(mask)), *[True] * len(answer)]
        if self._mode == "think_high":
            self._texts.append((prompt + answer, mask))
            seen = without_reasoning(prompt, answer, self._tokenizer)
            self._history = seen, [False] * len(seen)
        else:
            self._texts = [(prompt + answer, mask)]
            self._history = self._texts[0]
        if answer[-1] != self._eos_id:
            self._rounds.clear()

    def documents(self) -> list[Document]:
        """The last text under the conversation's id, earlier ones in front; an empty document where nothing was answered."""
        *earlier, last = self._texts or [([], [])]
        named = [(f"{self.conversation.id}#{number}", *text) for number, text in enumerate(earlier, start=1)]
        return [
            Document(name, self.conversation.domain, torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.bool))
            for name, ids, mask in (*named, (self.conversation.id, *last))
        ]


def documents_of(conversation: Conversation, done: dict[str, Document]) -> list[Document]:
    """What ``documents`` gave, found by name."""
    earlier = (f"{conversation.id}#{number}" for number in range(1, len(conversation.turns)))
    return [done[name] for name in (*earlier, conversation.id) if name in done]
