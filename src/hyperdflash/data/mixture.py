"""Which conversations a training stage sees: a number of each domain, training and validation apart.

Two corpora with one interface, ``train()`` and ``validation_conversations()``: the embedded corpus, and hub data sets or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hyperdflash.contracts import DOMAINS, Conversation
from hyperdflash.data.benchmark_rows import BENCHMARKS
from hyperdflash.data.benchmarks import benchmark_prompts
from hyperdflash.data.decontaminate import decontaminate
from hyperdflash.data.prompts import load_eval_prompts
from hyperdflash.data.row_stats import BENCHMARK, DUPLICATE, Account
from hyperdflash.data.selection import Choice, Selection, account_of, asked_hash, select
from hyperdflash.data.sources import check_source
from hyperdflash.data.stable_hash import content_hash
from hyperdflash.settings import boolean, natural_int, one_of, positive_int
from tiny_target.corpus.embedded import load_embedded

SERVER = "server:"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What both sources share.

    ``stage`` 1 or 2 chooses the mixture ``stage1`` or ``stage2``; ``responses`` are written by the target or taken as they
    are; ``temperature``, ``top_p``, ``max_new_tokens`` (a turn) say how the target answers, ``max_length`` cuts a document.
    ``responses: server:NAME`` are the target's, made by a server that has it as model NAME (python -m src.regenerate).
    ``accounts`` tells after ``train()`` what became of each source's rows.
    """

    stage: int
    validation: int
    responses: str
    temperature: float
    top_p: float
    max_new_tokens: int
    max_length: int
    accounts: list[Account] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.server_model is None:
            one_of("corpus.responses", self.responses, ("target", "original", SERVER + "NAME"))
        if self.stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {self.stage!r}: use experiment=stage1 or experiment=stage2")
        for name in ("validation", "max_new_tokens", "max_length"):
            positive_int(f"corpus.{name}", getattr(self, name))

    @property
    def server_model(self) -> str | None:
        """NAME of ``responses: server:NAME``."""
        name = self.responses.removeprefix(SERVER) if isinstance(self.responses, str) else ""
        return name if name and name != self.responses else None


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
    """``stage1``, ``stage2``: a list of ``{source, count}``; ``source`` is a hub id or a file (data.sources), a file
    needs its ``domain``, ``skip`` leaves out the source's first training rows by rank, and ``fill_to`` instead of ``count``
    takes as many as bring the stage to that number. Both are caps: a source that has fewer rows gives what it has, and rows
    that are left out afterwards (benchmarks, questions of two sources) are not replaced.

    Which rows, and their order: hyperdflash.data.selection (``seed``, ``heldout``, ``min_chars``, ``max_chars``), kept below
    ``directory``. Training and validation rows are on different sides of a split by content, in every source alike.
    ``decontaminate``: leave out conversations that hold a prompt of the paper's seven benchmarks, which are read from
    ``benchmarks_path`` (a folder, or None for the hub).

    In memory: the conversations that are returned, once.
    """

    stage1: Sequence[Mapping]
    stage2: Sequence[Mapping]
    seed: int
    heldout: float
    min_chars: int
    max_chars: int
    decontaminate: bool
    benchmarks_path: str | Path | None
    directory: str | Path

    def __post_init__(self):
        super().__post_init__()
        boolean("corpus.decontaminate", self.decontaminate)
        _ = self._choice
        for name, entries in (("stage1", self.stage1), ("stage2", self.stage2)):
            for entry in entries:
                _check_entry(name, entry)
        if not self._entries:
            raise ValueError(f"corpus.stage{self.stage} is empty: give at least one source and count")
        for entry in self._entries:
            check_source(entry["source"], entry.get("domain"))

    @property
    def _entries(self) -> Sequence[Mapping]:
        return self.stage1 if self.stage == 1 else self.stage2

    @property
    def _choice(self) -> Choice:
        return Choice(seed=self.seed, heldout=self.heldout, min_chars=self.min_chars, max_chars=self.max_chars)

    def train(self) -> list[Conversation]:
        """This stage's conversations of all sources, in one order that is a seeded function of their ids."""
        found: dict[str, Conversation] = {}  # by what is asked, which two sources may have in common
        self.accounts.clear()
        for entry in self._entries:
            selection = self._selection(entry)
            wanted = entry["count"] if "count" in entry else max(0, entry["fill_to"] - len(found))
            ours = selection.conversations("train", entry.get("skip", 0), wanted)
            if wanted and not ours:
                raise ValueError(
                    f"{entry['source']} has {selection.num_train:,} training rows, none of them behind "
                    f"skip={entry.get('skip', 0)}: give a smaller skip, or see the first line of {selection.path}"
                )
            account = account_of(selection, len(ours))
            self.accounts.append(account)
            kept = self._clean(ours, "training")
            account.move(len(ours) - len(kept), BENCHMARK)
            new = {asked_hash(c): c for c in kept}
            account.move(len(kept) - len(new.keys() - found.keys()), DUPLICATE)
            found = new | found
        return sorted(found.values(), key=lambda c: content_hash(f"{self.seed}\x00{c.id}"))

    def validation_conversations(self) -> list[Conversation]:
        """``validation`` held-out conversations of each source, equal ones once."""
        found = {}
        for entry in self._entries:
            selection = self._selection(entry)
            if not selection.num_heldout:
                raise ValueError(
                    f"{entry['source']} has no held-out row at corpus.heldout={self.heldout}: raise it (a share of all rows)"
                )
            found |= {asked_hash(c): c for c in selection.conversations("heldout", 0, self.validation)}
        return self._clean(list(found.values()), "validation")

    def _selection(self, entry: Mapping) -> Selection:
        """For both stages at once, so that a source is read once for all of them."""
        both = (*self.stage1, *self.stage2)
        same = [e for e in both if (e["source"], e.get("domain")) == (entry["source"], entry.get("domain"))]
        return select(
            entry["source"],
            entry.get("domain"),
            self._choice,
            num_train=max(e.get("skip", 0) + e.get("count", e.get("fill_to", 0)) for e in same),
            num_heldout=self.validation,
            directory=Path(self.directory),
        )

    def _clean(self, conversations: list[Conversation], what: str) -> list[Conversation]:
        return decontaminate(conversations, self._benchmark_prompts, what=what) if self.decontaminate else conversations

    @cached_property
    def _benchmark_prompts(self) -> list[Conversation]:
        try:
            return [prompt for name in BENCHMARKS for prompt in benchmark_prompts(name, self.benchmarks_path)]
        except ValueError as error:
            raise ValueError(f"{error}; or train without the check: corpus.decontaminate=false") from error


def _check_entry(stage: str, entry: Mapping) -> None:
    keys = set(entry)
    if not ({"source"} < keys <= {"source", "count", "fill_to", "skip", "domain"} and ("count" in keys) != ("fill_to" in keys)):
        raise ValueError(
            f"corpus.{stage} has an entry with {', '.join(sorted(entry))}; wanted source and count (or fill_to), "
            "with skip and domain where needed"
        )
    for name in keys & {"count", "fill_to"}:
        positive_int(f"corpus.{stage} {name} of {entry['source']}", entry[name])
    natural_int(f"corpus.{stage} skip of {entry['source']}", entry.get("skip", 0))


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
