"""Which conversations a training stage sees: a number of each domain, training and validation apart.

Two sources with one interface, ``train()`` and ``validation_prompts()``: the embedded corpus, and hub data sets or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from src.contracts import DOMAINS, Conversation
from src.corpus.embedded import load_embedded
from src.corpus.prompts import load_eval_prompts
from src.corpus.sources import HUB_DATASETS, stream
from src.corpus.stable_hash import content_hash

RESPONSES = ("target", "original")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What both sources share: ``responses`` written by the target or taken as they are, and the limits of an answer."""

    mixture: Mapping[str, int]
    validation: int
    responses: str
    temperature: float
    top_p: float
    max_new_tokens: int
    max_length: int

    def __post_init__(self):
        if self.responses not in RESPONSES:
            raise ValueError(f"corpus.responses must be {' or '.join(RESPONSES)}, got {self.responses!r}")
        for name, count in self.mixture.items():
            if not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"corpus.mixture.{name} must be a number of conversations of at least 0, got {count!r}"
                )
        if not any(self.mixture.values()):
            raise ValueError(
                f"corpus.mixture={dict(self.mixture)} asks for no conversation: give at least one domain a number"
            )
        if not isinstance(self.validation, int) or self.validation < 1:
            raise ValueError(f"corpus.validation must be at least 1 conversation a domain, got {self.validation!r}")
        if self.max_new_tokens < 1 or self.max_length < 3:
            raise ValueError(
                f"corpus.max_new_tokens must be at least 1 and corpus.max_length at least 3 tokens, got "
                f"{self.max_new_tokens} and {self.max_length}"
            )


@dataclass(frozen=True, kw_only=True)
class EmbeddedCorpus(Corpus):
    """``mixture`` conversations a domain from one ``half`` of the train split: the two stages never share a document."""

    half: int
    directory: str | Path = "runs/corpus"

    def __post_init__(self):
        super().__post_init__()
        if self.half not in (1, 2):
            raise ValueError(f"corpus.half must be 1 or 2, got {self.half!r}")
        if unknown := [name for name in self.mixture if name not in DOMAINS]:
            raise ValueError(f"corpus.mixture names {unknown[0]!r}; the embedded corpus has {', '.join(DOMAINS)}")

    def train(self) -> list[Conversation]:
        """The first ``mixture`` conversations of each domain, in the corpus's stable order."""
        side = self.half - 1
        ours = (c for c in load_embedded("train", cache_dir=self.directory) if int(content_hash(c.id), 16) % 2 == side)
        return _take(ours, self.mixture)

    def validation_conversations(self) -> list[Conversation]:
        """``validation`` held-out conversations of each domain in the mixture, none of them an evaluation prompt."""
        taken = {prompt.id for prompt in load_eval_prompts()}
        free = (c for c in load_embedded("heldout", cache_dir=self.directory) if c.id not in taken)
        return _take(free, {name: self.validation for name, count in self.mixture.items() if count})


@dataclass(frozen=True, kw_only=True)
class HubCorpus(Corpus):
    """``mixture`` conversations a source: a short name below, a hub id, or the path of a JSONL file."""

    domains: Mapping[str, str] = field(default_factory=dict)

    SHORT_NAMES = {name.split("/")[1].split("-v")[0].lower(): name for name in HUB_DATASETS}

    def _source(self, name: str, limit: int) -> Iterable[Conversation]:
        return stream(self.SHORT_NAMES.get(name, name), self.domains.get(name), limit=limit)

    def train(self) -> list[Conversation]:
        """After the held-out ones, which come first in each source."""
        return [c for name, count in self.mixture.items() if count for c in self._read(name, count)[self.validation :]]

    def validation_conversations(self) -> list[Conversation]:
        return [c for name, count in self.mixture.items() if count for c in self._read(name, 0)[: self.validation]]

    def _read(self, name: str, count: int) -> list[Conversation]:
        """The first ``validation + count`` conversations of a source, equal ones once."""
        return list({c.id: c for c in self._source(name, self.validation + count)}.values())


def _take(conversations: Iterable[Conversation], counts: Mapping[str, int]) -> list[Conversation]:
    left, chosen = Counter(dict(counts)), []
    for conversation in conversations:
        if left[conversation.domain] > 0:
            left[conversation.domain] -= 1
            chosen.append(conversation)
    if short := {name: n for name, n in left.items() if n > 0}:
        name, n = next(iter(short.items()))
        raise ValueError(
            f"the corpus has only {counts[name] - n} {name} conversations here, corpus.mixture wants {counts[name]}"
        )
    return chosen
