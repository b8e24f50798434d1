"""Decides which prompts fit a length limit; no prompt is cut.

A prompt fits if its own tokens and all its answers, each of the largest length, stay within the limit:

    tokens of its user turns with their headers + user turns * max_new_tokens <= max_length

So no answer ever ends at ``max_length``, and the choice depends on neither the target nor the temperature. A prompt that does
not fit is left out as a whole; the log counts and names it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import Conversation
from hyperdflash.data.chat import Mode, encode_rounds

log = logging.getLogger(__name__)
_NAMED = 20  # ids in one log line; the line counts the others


class LengthSplit(NamedTuple):
    """Prompt ids in their order; ``left_out`` maps each to the tokens that it needs."""

    fitting: list[str]
    left_out: dict[str, int]


def split_by_length(
    encoded: Iterable[tuple[str, Sequence[Sequence[int]]]], max_length: int, max_new_tokens: int
) -> LengthSplit:
    """Splits pairs of a prompt's id and the token ids of its user turns by the rule above."""
    split = LengthSplit([], {})
    for name, rounds in encoded:
        needed = sum(map(len, rounds)) + len(rounds) * max_new_tokens
        if needed <= max_length:
            split.fitting.append(name)
        else:
            split.left_out[name] = needed
    return split


def fitting_prompts(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    mode: Mode,
    max_length: int,
    max_new_tokens: int,
) -> list[Conversation]:
    """Returns the conversations that fit, in order; one log line per domain with some left out.

    ValueError where a domain loses all.
    """
    split = split_by_length(((c.id, encode_rounds(c, tokenizer, mode)) for c in conversations), max_length, max_new_tokens)
    domain_of = {conversation.id: conversation.domain for conversation in conversations}
    asked = Counter(domain_of.values())
    for domain, lost in Counter(domain_of[name] for name in split.left_out).items():
        names = [name for name in split.left_out if domain_of[name] == domain]
        most = max(split.left_out[name] for name in names)
        if lost == asked[domain]:
            raise ValueError(
                f"none of the {lost} prompts of {domain} fits max_length={max_length} with max_new_tokens={max_new_tokens} "
                f"per answer; the longest needs {most}: raise benchmarks.max_length or lower benchmarks.max_new_tokens"
            )
        log.warning(
            "benchmark %s: %d of %d prompts left out: longer than max_length=%d with max_new_tokens=%d per answer "
            "(the longest needs %d): %s",
            *(domain, lost, asked[domain], max_length, max_new_tokens, most, named(names)),
        )
    fitting = set(split.fitting)
    return [conversation for conversation in conversations if conversation.id in fitting]


def named(ids: Sequence[str]) -> str:
    """Joins ids for a message: ``a, b, c and 4 more``."""
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(ids[:_NAMED]) + more
