"""Training conversations that hold a benchmark's prompt are left out, counted by benchmark.

1. words        runs of letters, digits and underscores, in lower case; a benchmark's own wording around a question
                (hyperdflash.data.benchmark_rows) is not part of it
2. n-grams      13 words, the common choice since GPT-3 (Brown et al. 2020, appendix C); a prompt of 5 to 12 words is one
                n-gram as a whole
3. contained    a conversation shares an n-gram if any of its turns has it; a prompt under 5 words only if a turn is that
                prompt, with its wording or without
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from tqdm import tqdm

from hyperdflash.contracts import Conversation
from hyperdflash.data.benchmark_rows import BENCHMARKS
from hyperdflash.data.overlap import ngram_hashes, rolling_hashes

log = logging.getLogger(__name__)

NGRAM, SHORTEST = 13, 5
_BATCH = 500  # conversations hashed at once
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class PromptNgrams:
    """The n-grams of benchmark prompts (conversations whose ``domain`` is the benchmark)."""

    def __init__(self, prompts: Iterable[Conversation]):
        self._ids: dict[str, int] = {}  # word -> 1, 2, ...; 0 is every word that no prompt has
        self._whole: dict[tuple[str, ...], str] = {}
        hashes: dict[int, dict[str, list[np.ndarray]]] = {}
        for prompt in prompts:
            for turn in prompt.turns:
                known = BENCHMARKS.get(prompt.domain)
                found = words(known.question(turn.content) if known else turn.content)
                if len(found) < SHORTEST:
                    self._whole |= {tuple(found): prompt.domain, tuple(words(turn.content)): prompt.domain}
                    continue
                length = min(NGRAM, len(found))
                ids = [self._ids.setdefault(word, len(self._ids) + 1) for word in found]
                hashes.setdefault(length, {}).setdefault(prompt.domain, []).append(ngram_hashes(ids, length))
        self._longest_whole = max(map(len, self._whole), default=-1)
        # n -> benchmark -> sorted uint64
        self._by_benchmark = {
            n: {name: np.unique(np.concatenate(parts)) for name, parts in by_name.items()} for n, by_name in hashes.items()
        }
        self._all = {n: np.unique(np.concatenate(list(by_name.values()))) for n, by_name in self._by_benchmark.items()}

    def held_by(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """For each conversation the benchmark whose prompt it holds (one of them where there are several), or None."""
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
                ids.append(0)  # no n-gram reaches over a turn's end
            owner += [index] * (len(ids) - start)
        for n, hashes in rolling_hashes(ids, NGRAM):
            if n in self._all:
                for place in np.flatnonzero(_is_in(hashes, self._all[n])).tolist():
                    one = hashes[place : place + 1]
                    name = next(name for name, known in self._by_benchmark[n].items() if _is_in(one, known)[0])
                    held[owner[place]] = held[owner[place]] or name
        return held


def _is_in(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of ``hashes`` are in the sorted ``known``: np.isin would sort both every time."""
    return known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes


def held_prompts(
    conversations: Sequence[Conversation], prompts: Iterable[Conversation], *, what: str = "training", progress: bool = True
) -> list[str | None]:
    """For each conversation the benchmark whose prompt it holds, or None."""
    ngrams = PromptNgrams(prompts)
    held: list[str | None] = []
    with tqdm(total=len(conversations), desc=f"decontaminate {what}", unit="doc", mininterval=2, disable=not progress) as bar:
        for start in range(0, len(conversations), _BATCH):
            held += ngrams.held_by(conversations[start : start + _BATCH])
            bar.update(len(held) - start)
    return held


def decontaminate(
    conversations: Sequence[Conversation], prompts: Iterable[Conversation], *, what: str = "training", progress: bool = True
) -> list[Conversation]:
    """``conversations`` without those that hold a prompt of ``prompts``; one log line says how many, by benchmark."""
    names = held_prompts(conversations, prompts, what=what, progress=progress)
    kept = [conversation for conversation, name in zip(conversations, names, strict=True) if name is None]
    held = Counter(name for name in names if name is not None)
    by_name = ", ".join(f"{held[name]:,} {name}" for name in sorted(held, key=held.get, reverse=True))
    log.info(
        "decontamination: %s of %s %s conversations left out for sharing %d words in a row, or a whole shorter prompt, with a "
        "benchmark%s",
        *(f"{held.total():,}", f"{len(conversations):,}", what, NGRAM, f": {by_name}" if held else ""),
    )
    return kept
