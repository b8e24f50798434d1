"""Removes training conversations that hold a benchmark's prompt, and counts them by benchmark.

1. words      runs of letters, digits and underscores, in lower case, without the wording that a benchmark puts around its
              question (hyperdflash.data.benchmark_rows)
2. n-grams    13 words, the common choice since GPT-3 (Brown et al. 2020, appendix C); a prompt of 5 to 12 words is one n-gram
3. match      a conversation holds a prompt if one of its turns has one of the prompt's n-grams; a prompt under 5 words must
              equal a whole turn, with the benchmark's wording or without it
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from hyperdflash.contracts import Conversation
from hyperdflash.data.benchmark_rows import BENCHMARKS

log = logging.getLogger(__name__)

NGRAM, SHORTEST = 13, 5
_BATCH = 500  # conversations hashed at once
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Returns the words of ``text`` in lower case, in order."""
    return _WORD.findall(text.lower())


def rolling_hashes(ids: Sequence[int], longest: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (n, uint64 [T - n + 1]) for n up to ``longest`` or T: the hash of the n-gram that starts at each of ``ids`` [T].

    Each step extends the hashes of the step before.
    """
    tokens = np.asarray(ids, dtype=np.uint64)
    mixed = np.zeros(len(tokens), dtype=np.uint64)
    for n in range(1, min(longest, len(tokens)) + 1):
        mixed = mixed[: len(tokens) - n + 1]
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        mixed += tokens[n - 1 :] + np.uint64(1)
        yield n, mixed


class PromptNgrams:
    """The n-grams of benchmark prompts (conversations whose ``domain`` is the benchmark's name)."""

    def __init__(self, prompts: Iterable[Conversation]):
        self._ids: dict[str, int] = {}  # word -> 1, 2, ...; 0 is every word that no prompt has
        self._whole: dict[tuple[str, ...], str] = {}
        hashes: dict[int, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))  # n -> benchmark -> parts
        for prompt in prompts:
            for turn in prompt.turns:
                known = BENCHMARKS.get(prompt.domain)
                found = words(known.question(turn.content) if known else turn.content)
                if len(found) < SHORTEST:
                    self._whole |= {tuple(found): prompt.domain, tuple(words(turn.content)): prompt.domain}
                    continue
                length = min(NGRAM, len(found))
                ids = [self._ids.setdefault(word, len(self._ids) + 1) for word in found]
                *_, (_, found) = rolling_hashes(ids, length)
                for name in (None, prompt.domain):
                    hashes[length][name].append(found)
        self._longest_whole = max(map(len, self._whole), default=-1)
        # n -> benchmark -> sorted uint64; the benchmark None stands for all
        self._known = {
            n: {name: np.unique(np.concatenate(parts)) for name, parts in by_name.items()} for n, by_name in hashes.items()
        }

    def held_by(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """Returns per conversation the name of a benchmark whose prompt it holds, or None."""
        held: list[str | None] = [None] * len(conversations)
        ids: list[int] = []
        owner: list[int] = []  # index of the conversation that each of ``ids`` belongs to
        for index, conversation in enumerate(conversations):
            start = len(ids)
            for turn in conversation.turns:
                found = words(turn.content)
                if len(found) <= self._longest_whole:
                    held[index] = held[index] or self._whole.get(tuple(found))
                ids += [self._ids.get(word, 0) for word in found]
                ids.append(0)  # no n-gram crosses the end of a turn
            owner += [index] * (len(ids) - start)
        for n, hashes in rolling_hashes(ids, NGRAM):
            if n in self._known:
                for place in np.flatnonzero(_is_in(hashes, self._known[n][None])).tolist():
                    one = hashes[place : place + 1]
                    name = next(name for name, known in self._known[n].items() if name and _is_in(one, known)[0])
                    held[owner[place]] = held[owner[place]] or name
        return held


def _is_in(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns a mask of the ``hashes`` that are in the sorted ``known``; np.isin would sort both on every call."""
    return known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes


def decontaminate(
    conversations: Sequence[Conversation], prompts: Iterable[Conversation], *, what: str = "training"
) -> list[Conversation]:
    """Returns the ``conversations`` that hold none of ``prompts``; logs how many were removed per benchmark."""
    ngrams = PromptNgrams(prompts)
    names: list[str | None] = []
    with tqdm(total=len(conversations), desc=f"decontaminate {what}", unit="doc") as bar:
        for start in range(0, len(conversations), _BATCH):
            names += ngrams.held_by(conversations[start : start + _BATCH])
            bar.update(len(names) - start)
    held = Counter(name for name in names if name is not None)
    by_name = ", ".join(f"{count:,} {name}" for name, count in held.most_common())
    log.info(
        "decontamination: %s of %s %s conversations left out for sharing %d words in a row, or a whole shorter prompt, with a "
        "benchmark%s",
        *(f"{held.total():,}", f"{len(conversations):,}", what, NGRAM, f": {by_name}" if held else ""),
    )
    return [conversation for conversation, name in zip(conversations, names, strict=True) if name is None]
