"""A corpus of hub data sets and local files: selects rows by content, removes benchmark prompts, orders rows by a seed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hyperdflash.contracts import Conversation
from hyperdflash.data.benchmark_rows import BENCHMARKS
from hyperdflash.data.corpus import Corpus
from hyperdflash.data.decontaminate import decontaminate
from hyperdflash.data.prompts import benchmark_prompts
from hyperdflash.data.row_stats import BENCHMARK, BEYOND, DUPLICATE, HELD_OUT, RowStats
from hyperdflash.data.rows import FORMS
from hyperdflash.data.selection import Selection, asked_hash, select
from hyperdflash.data.sources import check_source, columns_of, is_row_file
from hyperdflash.settings import boolean, natural_int, number_between, positive_int
from hyperdflash.stable_hash import content_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamedCorpus(Corpus):
    """``stage1`` and ``stage2`` are lists of ``{source, count}``; ``source`` is a hub id or a file (hyperdflash.data.sources).

    A file needs its ``domain``; ``skip`` leaves out the source's first training rows by rank. ``count`` is an upper bound: a
    source with fewer rows gives all of them, and rows that are removed afterwards (benchmark prompts, questions of an earlier
    source) are not replaced.

    hyperdflash.data.selection chooses and orders the rows, and writes the selection below ``directory``. Training and
    validation rows are on different sides of one split by content. ``decontaminate`` removes conversations that hold a prompt
    of the paper's seven benchmarks, read from ``benchmarks_path`` (a folder, or None for the hub).
    """

    stage1: Sequence[Mapping]
    stage2: Sequence[Mapping]
    seed: int
    heldout: float
    decontaminate: bool
    benchmarks_path: str | Path | None
    directory: str | Path

    def __post_init__(self):
        super().__post_init__()
        natural_int("corpus.seed", self.seed)
        number_between("corpus.heldout", self.heldout, 0, 0.5)
        boolean("corpus.decontaminate", self.decontaminate)
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

    def source_files(self) -> list[Path]:
        """This stage's files, and those of the benchmarks that its rows are compared with."""
        files = [Path(entry["source"]) for entry in self._entries if is_row_file(entry["source"])]
        if self.decontaminate and self.benchmarks_path is not None:
            files += [Path(self.benchmarks_path) / f"{name}.jsonl" for name in BENCHMARKS]
        return files

    def train(self) -> list[Conversation]:
        """Returns this stage's conversations of all sources, ordered by a hash of the seed and their ids."""
        found: dict[str, Conversation] = {}  # by question, which two sources can share
        self.row_stats.clear()
        for entry in self._entries:
            selection, skip = self._selection(entry), entry.get("skip", 0)
            ours, stats = selection.train[skip : skip + entry["count"]], selection.stats
            if not ours:
                raise ValueError(_no_row(entry, stats, skip))
            stats.move(stats.taken - len(ours), BEYOND)
            self.row_stats.append(stats)
            kept = self._clean(ours, "training")
            stats.uncompared = self._benchmarks[1] if self.decontaminate else []
            stats.move(len(ours) - len(kept), BENCHMARK)
            new = {asked_hash(c): c for c in kept}
            stats.move(len(kept) - len(new.keys() - found.keys()), DUPLICATE)
            found = new | found
        return sorted(found.values(), key=lambda c: content_hash(f"{self.seed}\x00{c.id}"))

    def validation_conversations(self) -> list[Conversation]:
        """Returns ``validation`` held-out conversations of each source, each question once."""
        found = {}
        for entry in self._entries:
            selection = self._selection(entry)
            if not selection.heldout:
                why = f"no held-out row at corpus.heldout={self.heldout}, where rows that differ by numbers alone share a side"
                raise ValueError(f"{entry['source']} has {why}: raise it, or give more varied rows")
            found |= {asked_hash(c): c for c in selection.heldout[: self.validation]}
        return self._clean(list(found.values()), "validation")

    def _selection(self, entry: Mapping) -> Selection:
        """Selects for both stages together, so that a source is read once."""
        both = (*self.stage1, *self.stage2)
        same = [e for e in both if (e["source"], e.get("domain")) == (entry["source"], entry.get("domain"))]
        return select(
            entry["source"],
            entry.get("domain"),
            self.seed,
            self.heldout,
            num_train=max(e.get("skip", 0) + e["count"] for e in same),
            num_heldout=self.validation,
            directory=Path(self.directory),
        )

    def _clean(self, conversations: list[Conversation], what: str) -> list[Conversation]:
        return decontaminate(conversations, self._benchmarks[0], what=what) if self.decontaminate else conversations

    @cached_property
    def _benchmarks(self) -> tuple[list[Conversation], list[str]]:
        """The benchmarks' prompts, and the benchmarks that the hub did not give. A corpus of local files does without these."""
        names, prompts, absent = list(BENCHMARKS), [], []
        local = self.benchmarks_path is None and all(is_row_file(entry["source"]) for entry in self._entries)
        for place, name in enumerate(names):
            try:
                prompts += benchmark_prompts(name, self.benchmarks_path)
            except ValueError as error:
                if not local:
                    raise ValueError(f"{error}; or train without the check: corpus.decontaminate=false") from error
                offline = isinstance(error.__cause__, ConnectionError)  # so the others fail too, each after half a minute
                absent += names[place:] if offline else [name]
                log.warning(
                    "decontamination: no row is compared with %s, for the network gives none: %s", ", ".join(absent), error
                )
                if offline:
                    break
        return prompts, absent


def _no_row(entry: Mapping, stats: RowStats, skip: int) -> str:
    """Says why a source gives no training row."""
    source = entry["source"]
    if stats.taken:
        return f"{source} has {stats.taken:,} training rows, none of them behind skip={skip}: give a smaller skip"
    if held_out := stats.dropped[HELD_OUT]:
        why = "all on the held-out side, as rows are that differ by numbers alone"
        return f"{source} has {held_out:,} rows that fit, {why}: give a smaller corpus.heldout"
    reasons = "; ".join(line.strip() for line in stats.lines()[1:]) or "it is empty"
    return (
        f"{source} has no training row among {stats.read:,} ({reasons}): it has the columns "
        f"{', '.join(columns_of(source)) or '(none)'}, wanted one of {', '.join(FORMS)} (docs/data.md)"
    )


def _check_entry(stage: str, entry: object) -> None:
    keys = set(entry) if isinstance(entry, Mapping) else set()
    if not {"source", "count"} <= keys <= {"source", "count", "skip", "domain"}:
        given = f"with {', '.join(sorted(keys))}" if keys else repr(entry)
        raise ValueError(f"corpus.{stage} has an entry {given}; wanted source and count, with skip and domain where needed")
    positive_int(f"corpus.{stage} count of {entry['source']}", entry["count"])
    natural_int(f"corpus.{stage} skip of {entry['source']}", entry.get("skip", 0))
