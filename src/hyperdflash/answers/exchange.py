"""Answers one conversation turn by turn: returns the next prompt, takes its answer, and makes the documents. Each prompt holds
the history with the earlier answers. In non_think all turns are one document. In think_high each turn is one, since reasoning
leaves the history: the last has the conversation's id, earlier ones ``<id>#1``, ``<id>#2``, ..."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.chat import Mode, encode_rounds, history_after
from hyperdflash.data.tokenizer import special_ids
from hyperdflash.settings import check_sampling, positive_int

_LEAST_ROOM = 2  # tokens behind a prompt: one supervised pair


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How the target answers: ``temperature`` 0 is greedy, ``max_new_tokens`` per turn, ``max_length`` tokens per document."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 192
    max_length: int = 512
    mode: Mode = "non_think"
    seed: int = 0
    dtype: str = "fp32"  # of the target's computation
    batch_rows: int = 512

    def __post_init__(self):
        positive_int("max_new_tokens", self.max_new_tokens)
        check_sampling(self.temperature, self.top_p)


class Exchange:
    """Call ``prompt`` and ``add`` in turn until ``prompt`` returns None, then ``documents``."""

    def __init__(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings):
        self.conversation = conversation
        self._tokenizer, self._mode, self._max_length = tokenizer, settings.mode, settings.max_length
        self._eos_id = special_ids(tokenizer, mask_id=0).eos
        self._rounds = encode_rounds(conversation, tokenizer, settings.mode)
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
