"""DeepSeek-V4's chat encoding and the loss mask. DeepSeek ships no template; the encoding adds no line breaks.

    non_think    <bos>{system}<User>{user}<Assistant></think>{answer}<eos>
    think_high   <bos>{system}<User>{user}<Assistant><think>{reasoning}</think>{answer}<eos>

1. check the roles: an optional system turn, then user and assistant in turn
2. encode each piece of text; a control token spelled inside the text stays plain characters
3. join the pieces with control tokens; supervise what an assistant writes and its end token, never the header before it
   -> input_ids [T] int64, loss_mask [T] bool

All answers but the last use the ``</think>`` header and lose their reasoning. The content of an assistant turn holds
reasoning as ``<think>{reasoning}</think>{answer}``; without these tags the reasoning is empty.

``encode_rounds`` and ``history_after`` serve a target that answers several user turns itself.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import Conversation, Document, Turn
from hyperdflash.data.rows import alternate
from hyperdflash.data.tokenizer import SpecialIds, special_ids
from hyperdflash.settings import one_of

Mode = Literal["non_think", "think_high"]
MODES = ("non_think", "think_high")


class _Encoder:
    """Encodes plain text with one tokenizer; the ids never include a control token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        # The Rust object of a fast tokenizer is several times faster than its wrapper.
        self._encode = getattr(tokenizer, "backend_tokenizer", tokenizer).encode
        # The encoding never writes the mask, so any id can stand for an absent one.
        self.ids: SpecialIds = special_ids(tokenizer, mask_id=None if "<｜mask｜>" in tokenizer.get_vocab() else 0)
        self.added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(filter(None, self.added.values()), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)))

    def text(self, text: str) -> list[int]:
        """Encodes ``text``; cuts a control token spelled in it after its first character, so that no merge joins it."""
        ids: list[int] = []
        start = 0
        while match := self.control.search(text, start):
            ids += self._plain(text[start : match.start() + 1])
            start = match.start() + 1
        return ids + self._plain(text[start:])

    def _plain(self, text: str) -> list[int]:
        ids = self._encode(text, add_special_tokens=False) if text else []
        ids = getattr(ids, "ids", ids)
        assert not any(index in self.added for index in ids), "a control token came out of plain text"
        return ids


@lru_cache(maxsize=8)
def _encoder(tokenizer: PreTrainedTokenizerBase) -> _Encoder:
    return _Encoder(tokenizer)


def split_reasoning(content: str) -> tuple[str, str]:
    """Splits ``<think>reasoning</think>answer`` into (reasoning, answer); returns ("", content) for other content."""
    if content.startswith("<think>") and "</think>" in content:
        reasoning, _, answer = content.removeprefix("<think>").partition("</think>")
        return reasoning, answer
    return "", content


def _check(conversation: Conversation, mode: str) -> None:
    one_of("chat mode", mode, MODES)
    if not alternate(conversation.turns):
        roles = ", ".join(turn.role for turn in conversation.turns) or "none"
        wanted = "wanted an optional system turn, then user and assistant in turn"
        raise ValueError(f"conversation {conversation.id} has roles {roles}; {wanted}: read rows by hyperdflash.data.rows")
    for turn in conversation.turns:
        try:
            turn.content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the {turn.role} turn of {conversation.id} is not UTF-8 text at character {error.start}"
            ) from None


def _pieces(turns: Sequence[Turn], encoder: _Encoder, mode: Mode) -> list[tuple[list[int], bool]]:
    """Returns (ids, supervised) pieces in order, from the first token to the end of the last turn."""
    ids = encoder.ids
    pieces: list[tuple[list[int], bool]] = [([ids.bos], False)]
    for index, turn in enumerate(turns):
        if turn.role == "system":
            pieces.append((encoder.text(turn.content), False))
        elif turn.role == "user":
            pieces.append(([ids.user, *encoder.text(turn.content)], False))
        else:
            reasoning, answer = split_reasoning(turn.content)
            if mode == "think_high" and index == len(turns) - 1:
                pieces.append(([ids.assistant, ids.think], False))
                pieces.append(([*encoder.text(reasoning), ids.think_end, *encoder.text(answer), ids.eos], True))
            else:
                pieces.append(([ids.assistant, ids.think_end], False))
                pieces.append(([*encoder.text(answer), ids.eos], True))
    return pieces


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    mode: Mode = "non_think",
    max_length: int | None = None,
) -> Document:
    """Encodes a conversation: ``input_ids`` [T] int64 and ``loss_mask`` [T] bool, cut at ``max_length`` tokens.

    ValueError for roles that do not alternate.
    """
    _check(conversation, mode)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1 token or None, got {max_length}")
    pieces = _pieces(conversation.turns, _encoder(tokenizer), mode)
    input_ids = [index for ids, _ in pieces for index in ids][:max_length]
    loss_mask = [supervised for ids, supervised in pieces for _ in ids][:max_length]
    return Document(
        id=conversation.id,
        domain=conversation.domain,
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        loss_mask=torch.tensor(loss_mask, dtype=torch.bool),
    )


def encode_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, mode: Mode = "non_think") -> list[int]:
    """Returns the ids of a conversation that ends at a user turn, followed by the assistant's header of ``mode``."""
    _check(conversation, mode)
    if conversation.turns[-1].role != "user":
        advice = "remove the turns behind its last user turn, where a prompt ends"
        raise ValueError(f"conversation {conversation.id} ends at an assistant turn: {advice}")
    encoder = _encoder(tokenizer)
    ids = [index for piece, _ in _pieces(conversation.turns, encoder, mode) for index in piece]
    header = encoder.ids.think if mode == "think_high" else encoder.ids.think_end
    return [*ids, encoder.ids.assistant, header]


def user_rounds(conversation: Conversation) -> list[Conversation]:
    """Returns one conversation per user turn, the first with the system turn before it; drops the answers in between."""
    rounds, before = [], []
    for turn in conversation.turns:
        if turn.role == "assistant":
            continue
        before.append(turn)
        if turn.role == "user":
            rounds.append(Conversation(conversation.id, conversation.domain, tuple(before)))
            before = []
    return rounds


def encode_rounds(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, mode: Mode = "non_think") -> list[list[int]]:
    """Returns the ids that each user turn adds, the assistant's header of ``mode`` included; the first has the begin token.

    The prompt of user turn n is the history of the turns before it, then ``encode_rounds(...)[n]``.
    """
    first, *later = [encode_prompt(one, tokenizer, mode) for one in user_rounds(conversation)]
    return [first, *(ids[1:] for ids in later)]


def history_after(prompt: Sequence[int], answer: Sequence[int], tokenizer: PreTrainedTokenizerBase, mode: Mode) -> list[int]:
    """Returns a prompt and its finished answer as a later turn sees them: in think_high without the reasoning.

    ``...<Assistant><think>`` + ``{reasoning}</think>{answer}<eos>`` becomes ``...<Assistant></think>{answer}<eos>``; an
    answer that never closed its reasoning leaves ``...<Assistant></think><eos>``.
    """
    if mode != "think_high":
        return [*prompt, *answer]
    special = _encoder(tokenizer).ids
    if prompt[-1] != special.think:
        raise ValueError(f"a think_high prompt ends in <think>, got token {prompt[-1]}: encode it with mode think_high")
    kept = list(answer)
    answered = kept[len(kept) - kept[::-1].index(special.think_end) :] if special.think_end in kept else [special.eos]
    return [*prompt[:-1], special.think_end, *answered]
