"""Selects and orders the rows of a source by what each row asks, never by its position.

1. length      drop conversations with fewer than ``min_chars`` or more than ``max_chars`` characters
2. question    the texts of system and user turns, normalized (NFKC, case, white space). Rows with the same question are one
               row whatever their answers, since under ``responses: target`` they become one document: the lowest id stays
3. side        held out or training, by the hash of the first user turn, normalized and with folded digits, so that rows with
               the same question are on one side
4. rank        a hash of ``seed`` and the question orders each side; the lowest ranks are taken, in that order

So shuffling a source changes nothing, and a larger number takes the same rows and more.

Memory holds one hash per row read (for duplicates), and rank, id and place of the rows taken so far; a spool file on disk holds
the texts. A finished selection is a JSONL file that later runs read; an unfinished one leaves nothing, and the next run reads
the source from its first row.
"""

from __future__ import annotations

import heapq
import json
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, Literal

from tqdm import tqdm

from hyperdflash.contracts import Conversation
from hyperdflash.data.row_files import is_row_file
from hyperdflash.data.row_stats import BEYOND, DUPLICATE, HELD_OUT, RowStats
from hyperdflash.data.rows import from_row, to_row
from hyperdflash.data.sources import placed
from hyperdflash.files import whole_file
from hyperdflash.leases import exclusive
from hyperdflash.settings import natural_int, number_between, positive_int
from hyperdflash.stable_hash import content_hash, fold_text, unit_interval

_FORMAT = 3  # of the selection file and of the rules above


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings of a selection: ``seed`` of the ranks, ``heldout`` the share of rows that no training
    sees, ``min_chars`` and ``max_chars`` the bounds of a conversation's length, all turns together."""

    seed: int
    heldout: float
    min_chars: int
    max_chars: int

    def __post_init__(self):
        natural_int("corpus.seed", self.seed)
        number_between("corpus.heldout", self.heldout, 0, 0.5)
        natural_int("corpus.min_chars", self.min_chars)
        positive_int("corpus.max_chars", self.max_chars)
        if self.max_chars < self.min_chars:
            raise ValueError(f"corpus.max_chars={self.max_chars} is below corpus.min_chars={self.min_chars}")

    def length_fault(self, conversation: Conversation) -> str | None:
        """Returns the reason to drop a conversation for its length; None where it fits."""
        length = sum(len(turn.content) for turn in conversation.turns)
        if length < self.min_chars:
            return f"below {self.min_chars:,} characters"
        return f"above {self.max_chars:,} characters" if length > self.max_chars else None

    def is_heldout(self, conversation: Conversation) -> bool:
        first = next(turn.content for turn in conversation.turns if turn.role == "user")
        return unit_interval(fold_text(_normalized(first)), salt="held-out row") < self.heldout

    def rank(self, asked: str) -> int:
        return int(content_hash(f"{self.seed}\x00{asked}"), 16)


def asked_text(conversation: Conversation) -> str:
    """Returns the question: equal for rows that differ only in answers, case, white space or compatibility characters."""
    turns = (turn for turn in conversation.turns if turn.role != "assistant")
    return "\x00".join(f"{turn.role}\x01{_normalized(turn.content)}" for turn in turns)


def asked_hash(conversation: Conversation) -> str:
    return content_hash(asked_text(conversation))


def _normalized(text: str) -> str:
    folded = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


class _Lowest:
    """Holds the ``size`` offered conversations of the lowest ranks, in order of rank."""

    def __init__(self, size: int, spool: BinaryIO):
        self.size, self._spool = size, spool
        self._heap: list[int] = []  # -rank
        self._spooled: dict[int, tuple[str, int]] = {}  # rank -> id, where its line starts

    def wants(self, rank: int) -> bool:
        return self.size > 0 and (len(self._heap) < self.size or rank <= -self._heap[0])

    def offer(self, rank: int, conversation: Conversation) -> None:
        if not self.wants(rank):
            return
        known = self._spooled.get(rank)
        if known is None:
            heapq.heappush(self._heap, -rank)
            if len(self._heap) > self.size:
                del self._spooled[-heapq.heappop(self._heap)]
        elif known[0] <= conversation.id:
            return
        self._spooled[rank] = conversation.id, self._spool.tell()
        self._spool.write(json.dumps(to_row(conversation), ensure_ascii=False).encode() + b"\n")

    def __len__(self) -> int:
        return len(self._spooled)

    def lines(self) -> Iterator[bytes]:
        for rank in sorted(self._spooled):
            self._spool.seek(self._spooled[rank][1])
            yield self._spool.readline()


@dataclass(frozen=True)
class Selection:
    """A selection on disk: line 1 has the statistics and the number of rows per side; the rows follow, training first.

    Methods raise ValueError where the file is damaged.
    """

    path: Path
    stats: RowStats
    num_train: int
    num_heldout: int

    def conversations(self, split: Literal["train", "heldout"], start: int, count: int) -> list[Conversation]:
        """Returns ``count`` conversations of one side from rank ``start`` on, or as many as there are."""
        end = min(start + count, self.num_train if split == "train" else self.num_heldout)
        offset = 1 if split == "train" else 1 + self.num_train
        found = []
        with self.path.open("rb") as lines:
            for number, line in enumerate(islice(lines, offset + start, offset + end), start=offset + start + 1):
                with _undamaged(self.path, number):
                    found.append(from_row(json.loads(line)))
        if len(found) < end - start:
            raise _damaged(self.path, f"it ends before line {offset + end}")
        return found


def select(
    source: str | Path,
    domain: str | None,
    choice: Choice,
    *,
    num_train: int,
    num_heldout: int,
    directory: Path,
    progress: bool = True,
) -> Selection:
    """Returns a selection of ``source`` with at least these numbers of rows, or with all rows of the source.

    Reads it from ``directory`` where it exists; otherwise one process reads the source while the others wait.
    """
    path = directory / f"{_readable(source)}-{_key(source, domain, choice)}.jsonl"
    with exclusive(directory, f"leases/{path.stem}"):
        found = _read(path, num_train, num_heldout)
        if found is None:
            _write(path, source, domain, choice, num_train, num_heldout, progress)
            found = _read(path, num_train, num_heldout)
    assert found is not None
    return found


def _readable(source: str | Path) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(source).name.removesuffix(".zst"))


def _key(source: str | Path, domain: str | None, choice: Choice) -> str:
    identity: list[object] = [_FORMAT, str(source), domain, asdict(choice)]
    if is_row_file(source) and Path(source).is_file():
        status = Path(source).stat()
        identity += [str(Path(source).resolve()), status.st_size, status.st_mtime_ns]
    return content_hash(json.dumps(identity))


def _read(path: Path, num_train: int, num_heldout: int) -> Selection | None:
    """Returns None where the file is absent, or has fewer rows than wanted while the source has more."""
    if not path.is_file():
        return None
    with path.open("rb") as lines, _undamaged(path, 1):
        head = json.loads(lines.readline())
        enough = (num_train <= head["train"] or head["all_train"]) and (num_heldout <= head["heldout"] or head["all_heldout"])
        return Selection(path, RowStats.of_record(head["stats"]), head["train"], head["heldout"]) if enough else None


@contextmanager
def _undamaged(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"line {number}, {type(error).__name__}: {error}") from None


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"the selection {path} is damaged ({reason}): remove it, and the next run makes it again from its source")


def _write(path: Path, source, domain, choice: Choice, num_train: int, num_heldout: int, progress: bool) -> None:
    stats = RowStats(str(source))
    unique = {False: 0, True: 0}
    seen: set[int] = set()
    rows = placed(source, domain, stats=stats)
    with TemporaryFile() as train, TemporaryFile() as heldout:
        sides = {False: _Lowest(num_train, train), True: _Lowest(num_heldout, heldout)}
        for place, conversation in tqdm(rows, desc=f"reading {source}", unit="row", mininterval=2, disable=not progress):
            if fault := choice.length_fault(conversation):
                stats.drop(fault, place)
                continue
            rank = choice.rank(asked_text(conversation))
            is_heldout = choice.is_heldout(conversation)
            if rank in seen:
                stats.drop(DUPLICATE)
            else:
                seen.add(rank)
                unique[is_heldout] += 1
            sides[is_heldout].offer(rank, conversation)
        stats.taken = unique[False]
        if unique[True]:
            stats.dropped[HELD_OUT] = unique[True]
        head = {
            "stats": stats.as_record(),
            "choice": asdict(choice),
            **{"train": len(sides[False]), "all_train": len(sides[False]) == unique[False]},
            **{"heldout": len(sides[True]), "all_heldout": len(sides[True]) == unique[True]},
        }
        with whole_file(path, sync=True) as file:
            file.write(json.dumps(head).encode() + b"\n")
            for side in sides.values():
                file.writelines(side.lines())


def stats_of(selection: Selection, taken: int) -> RowStats:
    """Returns the selection's statistics for an entry that takes ``taken`` of its training rows."""
    stats = selection.stats.copy()
    if beyond := stats.taken - taken:
        stats.dropped[BEYOND] = beyond
    stats.taken = taken
    return stats
