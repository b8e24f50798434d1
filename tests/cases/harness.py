"""One case per line: a command in a folder of small inputs, and how it must end.

    Case("a removed file", "train $mini", 1, ["no file at rows.jsonl"], make=[remove("rows.jsonl")], absent=["runs/train"])

Each case runs in a folder of its own, which holds ``target`` (random weights), ``rows.jsonl`` (60 rows) and, where commands of
``after`` have run, ``runs``. Paths in a command are relative to this folder. ``$mini`` stands for the options of a training
that takes a second, ``$run`` for the directory of the finished run of the last stage, ``$long`` for 2,100 words,
``source:FILE`` for 20 rows of that file.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import SMALL_TRAINING

MINI = [
    "target.path=target",
    "corpus.stage1=[{source: rows.jsonl, domain: code, count: 23}]",
    "corpus.stage2=[{source: rows.jsonl, domain: code, count: 16, skip: 30}]",
    "trainer.max_epochs=1",
    *SMALL_TRAINING,
]
CAPTURED = "capture $mini"
STAGE1 = "train $mini"
STAGE2 = "train $mini experiment=stage2"
FRAME = (  # what Hydra prints around its sentence
    "Set the environment variable HYDRA_FULL_ERROR",
    "Available options in",
    "Config search path:",
    "full_key:",
    "object_type=",
    "\t",
)

Change = Callable[[Path], object]  # writes or damages something in a case's folder


@dataclass(frozen=True)
class Case:
    """``words`` occur in the output; ``exist`` are globs that match something in the folder, ``absent`` globs that do not."""

    name: str
    command: str  # what follows `python -m src.`
    code: int = 0
    words: Sequence[str] = ()
    exist: Sequence[str] = ()
    absent: Sequence[str] = ()
    after: Sequence[str] = ()  # commands that have succeeded before; cases share what these leave
    make: Sequence[Change] = ()  # changes between ``after`` and ``command``
    environment: Mapping[str, str | None] = field(default_factory=dict)  # None: the variable is not set
    apart: bool = False  # whether the command needs a process of its own; else it runs in this one, which is faster
    check: Change | None = None  # asserts what globs cannot
    within: Callable[[], AbstractContextManager] = nullcontext  # a limit of the system under which ``command`` runs


def words_of(command: str) -> list[str]:
    """Returns the words of a command, placeholders replaced."""
    words = []
    for word in shlex.split(command):
        if word.startswith("source:"):
            word = f"corpus.stage1=[{{source: {word.removeprefix('source:')}, domain: code, count: 20}}]"
        word = word.replace("$long", "word " * 2100)
        words += MINI if word == "$mini" else [word.replace("$run", str(last_run())) if "$run" in word else word]
    return words


def last_run(here: Path = Path()) -> Path:
    return max(here.glob("runs/train/stage?-*-????????/result.json")).parent


def sentences(stderr: str) -> list[str]:
    """Returns the lines of an error message, without those that Hydra prints around it and without progress bars."""
    lines = [line for line in stderr.split("\n") if line.strip() and "\r" not in line]
    return [line for line in lines if not line.startswith(FRAME)]


def write(name: str, content: str | bytes) -> Change:
    def change(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def write_in(pattern: str, *names: str) -> Change:
    """Writes foreign files, which no parser reads, into each folder of ``pattern``."""
    return lambda here: [
        write(f"{path.relative_to(here)}/{name}", b"\0\xff mine")(here) for path in _found(here, pattern) for name in names
    ]


def rows(name: str, *found: dict) -> Change:
    """Writes ``found`` as JSON Lines."""
    return write(name, "".join(json.dumps(row) + "\n" for row in found))


def edit(pattern: str, old: str, new: str) -> Change:
    """Replaces a text that the files of ``pattern`` must have."""

    def change(here: Path) -> None:
        for path in _found(here, pattern):
            assert old in path.read_text(), f"{path} does not hold {old!r}"
            path.write_text(path.read_text().replace(old, new))

    return change


def cut(pattern: str, share: float = 0.5) -> Change:
    """Leaves the first ``share`` of the bytes of each file of ``pattern``."""

    def change(here: Path) -> None:
        for path in _found(here, pattern):
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return change


def remove(*patterns: str) -> Change:
    def change(here: Path) -> None:
        for path in [path for pattern in patterns for path in _found(here, pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def copy(pattern: str, name: str) -> Change:
    """Copies the one file or folder of ``pattern`` to ``name`` beside it; {} in ``name`` stands for its own."""

    def change(here: Path) -> None:
        (path,) = _found(here, pattern)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, path.with_name(name.format(path.name)))

    return change


def move(old: str, new: str) -> Change:
    def change(here: Path) -> None:
        (here / new).parent.mkdir(parents=True, exist_ok=True)
        (here / old).rename(here / new)

    return change


def _found(here: Path, pattern: str) -> list[Path]:
    found = sorted(here.glob(pattern))
    assert found, f"no {pattern} in {here}"
    return found
