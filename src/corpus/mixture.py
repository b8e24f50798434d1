"""Which conversations a training stage sees: a number of each domain, training and validation apart.

Two corpora with one interface, ``train()`` and ``validation_conversations()``: the embedded corpus, and hub data sets or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from src.contracts import DOMAINS, Conversation
from src.corpus.benchmark_rows import BENCHMARKS
from src.corpus.benchmarks import benchmark_prompts
from src.corpus.decontaminate import decontaminate
from src.corpus.embedded import load_embedded
from src.corpus.prompts import load_eval_prompts
from src.corpus.sources import stream
from src.corpus.stable_hash import content_hash
from src.settings import boolean, natural_int, one_of, positive_int


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What both sources share.

    ``stage`` 1 or 2 chooses the mixture ``stage1`` or ``stage2``; ``responses`` are written by the target or taken as they
    are; ``temperature``, ``top_p``, ``max_new_tokens`` (a turn) say how the target answers, ``max_length`` cuts a document.
    """

    stage: int
    validation: int
    responses: str
    temperature: float
    top_p: float
    max_new_tokens: int
    max_length: int

    def __post_init__(self):
        one_of("corpus.responses", self.responses, ("target", "original"))
        if self.stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {self.stage!r}: use experiment=stage1 or experiment=stage2")
        for name in ("validation", "max_new_tokens", "max_length"):
            positive_int(f"corpus.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class EmbeddedCorpus(Corpus):
    """``stage1``, ``stage2``: conversations a domain, each from its own half of the train split, so that no document is
    in both."""

    stage1: Mapping[str, int]
    stage2: Mapping[str, int]
    directory: str | Path

    def __post_init__(self):
        super().__post_init__()
        for name, mixture in (("stage1", self.stage1), ("stage2", self.stage2)):
            if unknown := [domain for domain in mixture if domain not in DOMAINS]:
                raise ValueError(f"corpus.{name} names {unknown[0]!r}; the embedded corpus has {', '.join(DOMAINS)}")
            for domain, count in mixture.items():
                natural_int(f"corpus.{name}.{domain}", count)
        if not any(self._mixture.values()):
            raise ValueError(f"corpus.stage{self.stage} asks for no conversation: give at least one domain a number")

    @property
    def _mixture(self) -> Mapping[str, int]:
        return self.stage1 if self.stage == 1 else self.stage2

    def train(self) -> list[Conversation]:
        """The first conversations of each domain in this stage's half, in the corpus's stable order."""
        side = self.stage - 1
        ours = (c for c in load_embedded("train", cache_dir=self.directory) if int(content_hash(c.id), 16) % 2 == side)
        return _take(ours, self._mixture)

    def validation_conversations(self) -> list[Conversation]:
        """``validation`` held-out conversations of each domain in the mixture, none of them an evaluation prompt."""
        taken = {prompt.id for prompt in load_eval_prompts()}
        free = (c for c in load_embedded("heldout", cache_dir=self.directory) if c.id not in taken)
        return _take(free, {name: self.validation for name, count in self._mixture.items() if count})


@dataclass(frozen=True, kw_only=True)
class StreamedCorpus(Corpus):
    """``stage1``, ``stage2``: a list of ``{source, count}``, with ``skip`` rows to leave out first and the ``domain`` of a
    local JSONL file; ``source`` is a hub id or a file (src.corpus.sources).

    ``decontaminate``: leave out conversations that hold a prompt of the paper's seven benchmarks, which are read from
    ``benchmarks_path`` (a folder, or None for the hub); ``count`` is the number before that.
    """

    stage1: Sequence[Mapping]
    stage2: Sequence[Mapping]
    decontaminate: bool
    benchmarks_path: str | Path | None

    def __post_init__(self):
        super().__post_init__()
        boolean("corpus.decontaminate", self.decontaminate)
        for name, entries in (("stage1", self.stage1), ("stage2", self.stage2)):
            for entry in entries:
                if not {"source", "count"} <= set(entry) <= {"source", "count", "skip", "domain"}:
                    raise ValueError(
                        f"corpus.{name} has an entry with {', '.join(sorted(entry))}; wanted source and count, "
                        "with skip and domain where needed"
                    )
                positive_int(f"corpus.{name} count of {entry['source']}", entry["count"])
        if not self._entries:
            raise ValueError(f"corpus.stage{self.stage} is empty: give at least one source and count")

    @property
    def _entries(self) -> Sequence[Mapping]:
        return self.stage1 if self.stage == 1 else self.stage2

    def train(self) -> list[Conversation]:
        """After the validation conversations, which come first in each source's part."""
        held_out = {c.id for c in self._first()}
        found = (c for entry in self._entries for c in self._read(entry, self.validation, entry["count"]))
        return self._clean(list({c.id: c for c in found if c.id not in held_out}.values()), "training")

    def validation_conversations(self) -> list[Conversation]:
        return self._clean(self._first(), "validation")

    def _first(self) -> list[Conversation]:
        return [c for entry in self._entries for c in self._read(entry, 0, self.validation)]

    def _clean(self, conversations: list[Conversation], what: str) -> list[Conversation]:
        if not self.decontaminate:
            return conversations
        return decontaminate(conversations, self._benchmark_prompts, what=what)

    @cached_property
    def _benchmark_prompts(self) -> list[Conversation]:
        try:
            return [prompt for name in BENCHMARKS for prompt in benchmark_prompts(name, self.benchmarks_path)]
        except ValueError as error:
            raise ValueError(f"{error}; or train without the check: corpus.decontaminate=false") from error

    def _read(self, entry: Mapping, start: int, count: int) -> list[Conversation]:
        """``count`` well-formed conversations after ``skip + start``, equal ones once."""
        start += entry.get("skip", 0)
        rows = stream(entry["source"], entry.get("domain"), limit=start + count)
        found = list({c.id: c for c in islice(rows, start, None)}.values())
        if not found:
            raise ValueError(f"{entry['source']} has no conversation after row {start}: give a smaller skip or validation")
        return found


def _take(conversations: Iterable[Conversation], counts: Mapping[str, int]) -> list[Conversation]:
    left, chosen = Counter(dict(counts)), []
    for conversation in conversations:
        if left[conversation.domain] > 0:
            left[conversation.domain] -= 1
            chosen.append(conversation)
    if short := {name: n for name, n in left.items() if n > 0}:
        name, n = next(iter(short.items()))
        raise ValueError(f"the corpus has only {counts[name] - n} {name} conversations here, the mixture wants {counts[name]}")
    return chosen
