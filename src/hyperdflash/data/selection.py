"""Selects and orders the rows of a source by what each row asks, never by its position.

1. question    the texts of system and user turns, normalized (NFKC, case, white space). Rows with the same question are one
               row whatever their answers, since under ``responses: target`` they become one document: the lowest id stays
2. side        held out or training, by the hash of the first user turn, normalized and with folded digits, so that rows with
               the same question are on one side
3. rank        a hash of ``seed`` and the question orders each side; the lowest ranks are taken, in that order

So shuffling a source changes nothing, and a larger number takes the same rows and more.

A temporary SQLite file sorts the rows, so that memory holds one row of the source at a time. A finished selection is a JSONL
file that later runs read: line 1 has the statistics and the number of rows per side, the rows follow, training first. A damaged
one is made again, and an unfinished one leaves nothing.
"""

import json
import logging
import sqlite3
import unicodedata
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hyperdflash.contracts import Conversation
from hyperdflash.data.row_stats import DUPLICATE, HELD_OUT, RowStats
from hyperdflash.data.rows import from_row, to_row
from hyperdflash.data.sources import is_row_file, read_source
from hyperdflash.files import whole_file
from hyperdflash.leases import exclusive
from hyperdflash.stable_hash import content_hash, fold_text, unit_interval

log = logging.getLogger(__name__)

_FORMAT = 6  # of the selection file, of the rules above and of those of hyperdflash.data.rows


def _asked_text(conversation: Conversation) -> str:
    """Returns the question: equal for rows that differ only in answers, case, white space or compatibility characters."""
    turns = (turn for turn in conversation.turns if turn.role != "assistant")
    return "\x00".join(f"{turn.role}\x01{_normalized(turn.content)}" for turn in turns)


def asked_hash(conversation: Conversation) -> str:
    return content_hash(_asked_text(conversation))


def _normalized(text: str) -> str:
    folded = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


@dataclass(frozen=True)
class Selection:
    """The chosen conversations of a source, of each side in the order of their ranks, and what became of its rows."""

    stats: RowStats
    train: list[Conversation]
    heldout: list[Conversation]


def select(
    source: str | Path, domain: str | None, seed: int, heldout: float, *, num_train: int, num_heldout: int, directory: Path
) -> Selection:
    """Returns a selection of ``source`` with at least these numbers of rows, or with all rows of the source; ``heldout`` is the
    share of rows that no training sees.

    Reads it from ``directory`` where it exists; otherwise one process reads the source while the others wait.
    """
    identity: list[object] = [_FORMAT, str(source), domain, seed, heldout]
    if is_row_file(source) and Path(source).is_file():
        status = Path(source).stat()
        identity += [str(Path(source).resolve()), status.st_size, status.st_mtime_ns]
    readable = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(source).name.removesuffix(".zst"))
    path = directory / f"{readable}-{content_hash(json.dumps(identity))}.jsonl"
    with exclusive(directory, f"leases/{path.stem}"):
        if found := _read(path, num_train, num_heldout):
            return found
        try:
            _write(path, source, domain, seed, heldout, num_train, num_heldout)
        except sqlite3.OperationalError as error:
            advice = "free some space there, or set SQLITE_TMPDIR to another folder"
            raise ValueError(f"{source} does not fit into the folder of temporary files ({error}): {advice}") from error
        return _read(path, num_train, num_heldout)


def _read(path: Path, num_train: int, num_heldout: int) -> Selection | None:
    """Returns None where the file is absent or damaged, or has fewer rows than wanted while the source has more."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as lines:
            head = json.loads(lines.readline())
            for side, wanted in (("train", num_train), ("heldout", num_heldout)):
                if wanted > head[side] and not head[f"all_{side}"]:
                    return None
            rows = [from_row(json.loads(line)) for line in lines]
            if len(rows) == head["train"] + head["heldout"]:
                return Selection(RowStats.of_record(head["stats"]), rows[: head["train"]], rows[head["train"] :])
            fault = f"{len(rows)} rows, wanted {head['train'] + head['heldout']}"
    except (ValueError, TypeError, KeyError) as error:
        fault = f"{type(error).__name__}: {error}"
    log.warning("the selection %s is damaged (%s): its source is read again", path, fault)
    return None


def _write(path: Path, source, domain, seed: int, heldout: float, num_train: int, num_heldout: int) -> None:
    stats = RowStats(str(source))
    with closing(sqlite3.connect("")) as rows:  # a temporary file, removed when it is closed
        rows.execute("PRAGMA journal_mode = OFF")
        rows.execute("CREATE TABLE rows (rank INTEGER PRIMARY KEY, heldout INTEGER, id TEXT, line TEXT)")
        found = read_source(source, domain, stats)
        for conversation in tqdm(found, desc=f"reading {source}", unit="row"):
            stats.taken += 1
            line = json.dumps(to_row(conversation), ensure_ascii=False)
            first = next(turn.content for turn in conversation.turns if turn.role == "user")
            # a hash of 64 bits; SQLite's integers have a sign
            rank = int(content_hash(f"{seed}\x00{_asked_text(conversation)}"), 16) - 2**63
            rows.execute(
                "INSERT INTO rows VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET id = excluded.id, line = excluded.line "
                "WHERE excluded.id < rows.id",
                (rank, unit_interval(fold_text(_normalized(first)), salt="held-out row") < heldout, conversation.id, line),
            )
        sides = dict(rows.execute("SELECT heldout, count(*) FROM rows GROUP BY heldout"))
        all_train, all_heldout = sides.get(0, 0), sides.get(1, 0)
        stats.move(stats.taken - all_train - all_heldout, DUPLICATE)
        stats.move(all_heldout, HELD_OUT)
        head = {
            "stats": stats.as_record(),
            "seed": seed,
            "share_heldout": heldout,
            **{"train": min(num_train, all_train), "all_train": num_train >= all_train},
            **{"heldout": min(num_heldout, all_heldout), "all_heldout": num_heldout >= all_heldout},
        }
        with whole_file(path, sync=True) as file:
            file.write(json.dumps(head).encode() + b"\n")
            for side in ((0, num_train), (1, num_heldout)):
                for (line,) in rows.execute("SELECT line FROM rows WHERE heldout = ? ORDER BY rank LIMIT ?", side):
                    file.write(line.encode() + b"\n")
