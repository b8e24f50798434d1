"""Removes training conversations that hold a benchmark's prompt, and counts them by benchmark.

1. words      runs of letters, digits and underscores, in lower case, without the wording that a benchmark puts around its
              question (hyperdflash.data.benchmark_rows)
2. n-grams    13 words, the common choice since GPT-3 (Brown et al. 2020, appendix C); a prompt of 5 to 12 words is one n-gram
3. match      a conversation holds a prompt if one of its turns has one of the prompt's n-grams; a prompt under 5 words must
              equal a whole turn, with the benchmark's wording or without it
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from hyperdflash.contracts import Conversation
from hyperdflash.data.benchmark_rows import BENCHMARKS

log = logging.getLogger(__name__)

NGRAM, SHORTEST = 13, 5
_WORD = re.compile(r"\w+")


def words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


class PromptNgrams:
    """The n-grams of benchmark prompts (conversations whose ``domain`` is the benchmark's name)."""

    def __init__(self, prompts: Iterable[Conversation]):
        self._whole: dict[tuple[str, ...], str] = {}  # words of a short prompt -> benchmark
        self._ngrams: dict[tuple[str, ...], str] = {}  # n-gram -> benchmark
        for prompt in prompts:
            for turn in prompt.turns:
                known = BENCHMARKS.get(prompt.domain)
                found = words(known.question(turn.content) if known else turn.content)
                if len(found) < SHORTEST:
                    self._whole |= {found: prompt.domain, words(turn.content): prompt.domain}
                length = min(NGRAM, len(found))
                for start in range(len(found) - length + 1 if len(found) >= SHORTEST else 0):
                    self._ngrams[found[start : start + length]] = prompt.domain
        self._lengths = sorted({len(ngram) for ngram in self._ngrams})
        self._starts = {ngram[:SHORTEST] for ngram in self._ngrams}  # decide at most places, at the cost of one look

    def held_by(self, conversation: Conversation) -> str | None:
        """Returns the name of a benchmark whose prompt the conversation holds, or None."""
        for turn in conversation.turns:
            found = words(turn.content)
            if found in self._whole:
                return self._whole[found]
            for place, start in enumerate(zip(*(found[i:] for i in range(SHORTEST)), strict=False)):
                if start in self._starts:
                    for length in self._lengths:
                        if name := self._ngrams.get(found[place : place + length]):
                            return name
        return None


def decontaminate(
    conversations: Sequence[Conversation], prompts: Iterable[Conversation], *, what: str = "training"
) -> list[Conversation]:
    """Returns the ``conversations`` that hold none of ``prompts``; logs how many were removed per benchmark."""
    ngrams = PromptNgrams(prompts)
    bar = tqdm(conversations, desc=f"decontaminate {what}", unit="doc")
    names = [ngrams.held_by(conversation) for conversation in bar]
    held = Counter(name for name in names if name is not None)
    by_name = ", ".join(f"{count:,} {name}" for name, count in held.most_common())
    log.info(
        "decontamination: %s of %s %s conversations left out for sharing %d words in a row, or a whole shorter prompt, with a "
        "benchmark%s",
        *(f"{held.total():,}", f"{len(conversations):,}", what, NGRAM, f": {by_name}" if held else ""),
    )
    return [conversation for conversation, name in zip(conversations, names, strict=True) if name is None]
