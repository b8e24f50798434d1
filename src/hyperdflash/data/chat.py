"""DeepSeek-V4's chat encoding and the loss mask (it ships no template; nothing inserts line breaks).

    non_think    <bos>{system}<User>{user}<Assistant></think>{answer}<eos>
    think_high   <bos>{system}<User>{user}<Assistant><think>{reasoning}</think>{answer}<eos>

1. check the roles: an optional system turn, then user and assistant in turn
2. each piece of text -> ids, with control tokens spelled inside the text kept as plain characters
3. join with control tokens; supervised: what an assistant writes and its end token, never the header before it

Earlier answers always use the ``</think>`` header and lose their reasoning. An assistant turn carries reasoning as
``<think>{reasoning}</think>{answer}`` at the start of its content; without it the reasoning is empty.

Where the model itself answers several user turns, ``encode_rounds`` gives what each adds to the history, and
``without_reasoning`` what a later turn sees of a think_high answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import Conversation, Document, Turn
from hyperdflash.data.tokenizer import SpecialIds, special_ids

Mode = Literal["non_think", "think_high"]
MODES = ("non_think", "think_high")


class _Encoder:
    """Text pieces -> ids for one tokenizer, never a control token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        # a fast tokenizer's Rust object is several times quicker than the wrapper around it
        self._encode = getattr(tokenizer, "backend_tokenizer", tokenizer).encode
        # the mask is never written by the encoding, so any id stands in for a missing one
        self.ids: SpecialIds = special_ids(tokenizer, mask_id=None if "<｜mask｜>" in tokenizer.get_vocab() else 0)
        self.added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(filter(None, self.added.values()), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)))

    def text(self, text: str) -> list[int]:
        """Ids of ``text``. A control token spelled in it is cut after its first character, which no merge can undo."""
        ids: list[int] = []
        start = 0
        for match in self.control.finditer(text):
            ids += self._plain(text[start : match.start() + 1])
            start = match.start() + 1
        return ids + self._plain(text[start:])

    def _plain(self, text: str) -> list[int]:
        # a cut can leave a second, shorter control token inside the rest ("<" + "<think>"): cut again
        match = self.control.search(text)
        if match and len(text) > 1:
            return self._plain(text[: match.start() + 1]) + self._plain(text[match.start() + 1 :])
        ids = self._encode(text, add_special_tokens=False) if text else []
        ids = getattr(ids, "ids", ids)
        assert not any(index in self.added for index in ids), "a control token came out of plain text"
        return ids


@lru_cache(maxsize=8)
def _encoder(tokenizer: PreTrainedTokenizerBase) -> _Encoder:
    return _Encoder(tokenizer)


def split_reasoning(content: str) -> tuple[str, str]:
    """``<think>reasoning</think>answer`` -> (reasoning, answer); ("", content) for anything else."""
    if content.startswith("<think>") and "</think>" in content:
        reasoning, _, answer = content.removeprefix("<think>").partition("</think>")
        return reasoning, answer
    return "", content


def _check(conversation: Conversation, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"chat mode must be one of {', '.join(MODES)}, got {mode!r}")
    turns = conversation.turns
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    roles = [turn.role for turn in spoken]
    wanted = ["user", "assistant"] * (len(roles) // 2 + 1)
    if not roles or roles != wanted[: len(roles)]:
        raise ValueError(
            f"conversation {conversation.id} has roles {', '.join(turn.role for turn in turns) or 'none'}; wanted an "
            "optional system turn, then user and assistant in turn; drop such rows with hyperdflash.data.sources.stream"
        )


def _pieces(turns: Sequence[Turn], encoder: _Encoder, mode: Mode) -> list[tuple[list[int], bool]]:
    """(ids, supervised) pieces in order, from the first token to the last turn's end."""
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
    """``Document`` with ``input_ids`` and ``loss_mask`` [T], T cut at ``max_length`` tokens."""
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
    """Ids of a conversation that ends at a user turn, followed by the assistant's header of ``mode``."""
    _check(conversation, mode)
    if conversation.turns[-1].role != "user":
        raise ValueError(
            f"conversation {conversation.id} ends at an assistant turn; a prompt ends at a user turn; "
            "cut it with hyperdflash.data.prompts.as_prompt"
        )
    encoder = _encoder(tokenizer)
    ids = [index for piece, _ in _pieces(conversation.turns, encoder, mode) for index in piece]
    header = encoder.ids.think if mode == "think_high" else encoder.ids.think_end
    return [*ids, encoder.ids.assistant, header]


def encode_answer(text: str, tokenizer: PreTrainedTokenizerBase, mode: Mode = "non_think") -> list[int]:
    """Ids of an answer's text after the header of ``mode``, without an end token: in think_high the first ``</think>`` is the
    control token, every other control token spelled in it plain characters."""
    encoder = _encoder(tokenizer)
    reasoning, closed, answer = text.partition("</think>") if mode == "think_high" else ("", "", text)
    return [*encoder.text(reasoning), *([encoder.ids.think_end] if closed else []), *encoder.text(answer)]


def user_rounds(conversation: Conversation) -> list[Conversation]:
    """[system +] user turn, user turn, ... each as a conversation of its own; any answers in between are left out."""
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
    """Ids that each user turn adds, ending in the assistant's header of ``mode``; the first starts with the begin token.

    The prompt of round n is the history of the rounds before it, then ``encode_rounds(...)[n]``.
    """
    first, *later = [encode_prompt(one, tokenizer, mode) for one in user_rounds(conversation)]
    return [first, *(ids[1:] for ids in later)]


def without_reasoning(prompt: Sequence[int], answer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A think_high prompt and its finished answer, as a later turn sees them.

    ``...<Assistant><think>`` + ``{reasoning}</think>{answer}<eos>`` becomes ``...<Assistant></think>{answer}<eos>``; an
    answer that never closed its reasoning leaves ``...<Assistant></think><eos>``.
    """
    special = _encoder(tokenizer).ids
    if prompt[-1] != special.think:
        raise ValueError(f"a think_high prompt ends in <think>, got token {prompt[-1]}: encode it with mode think_high")
    said = _after_reasoning(answer, special.think_end) if special.think_end in answer else [special.eos]
    return [*prompt[:-1], special.think_end, *said]


def history_after(prompt: Sequence[int], answer: Sequence[int], tokenizer: PreTrainedTokenizerBase, mode: Mode) -> list[int]:
    """A prompt and its finished answer, as a later turn sees them; in think_high ``without_reasoning``."""
    return without_reasoning(prompt, answer, tokenizer) if mode == "think_high" else [*prompt, *answer]


def _after_reasoning(ids: Sequence[int], think_end: int) -> list[int]:
    """What follows the last end of a reasoning; everything where there is none."""
    kept = list(ids)
    return kept[len(kept) - kept[::-1].index(think_end) :] if think_end in kept else kept


def answer_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of generated ids: up to the end token, after the reasoning if there is any, control tokens left out."""
    special = _encoder(tokenizer).ids
    kept = [int(index) for index in ids]
    if special.eos in kept:
        kept = kept[: kept.index(special.eos)]
    return tokenizer.decode(_after_reasoning(kept, special.think_end), skip_special_tokens=True)
