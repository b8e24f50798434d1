"""The index of finished training runs, which finds a run by the options that decide its result and ignores all others.

runs/train/<run>/result.json      exists when the run is finished: the deciding options, the target's fingerprint, its parent
runs/train/<run>/config.yaml      its whole configuration, resolved
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hyperdflash.identity import RECIPE, runs_dir
from hyperdflash.report.sweep_runs import flat


@dataclass(frozen=True)
class FinishedRun:
    """``record`` is the run's result.json."""

    directory: Path
    record: dict

    @cached_property
    def decided(self) -> dict[str, object]:
        """Dotted option -> value."""
        return flat(self.record["decided_by"])

    @property
    def is_current(self) -> bool:
        """Whether this version of the code would train the same configuration to the same result."""
        return self.decided.get("recipe") == RECIPE

    @property
    def command(self) -> str:
        return self.record.get("command", "no command")

    @property
    def finished_s(self) -> float:
        """End of the run, in seconds since the epoch."""
        return (self.directory / "result.json").stat().st_mtime

    @property
    def best_checkpoint(self) -> Path:
        return self.directory / self.record["best_checkpoint"]

    @property
    def parent(self) -> Path | None:
        """The run whose weights this one started from; the record holds a relative path when both lie in one runs folder."""
        return self.directory.absolute().parents[1] / self.record["init_from"] if self.record["init_from"] else None

    def agrees(self, options: Mapping[str, object]) -> bool:
        """Returns whether the run has all ``options``; it may have others."""
        return options.items() <= self.decided.items()

    def differences(self, wanted: Mapping[str, object], ignored: Collection[str] = ()) -> dict[str, tuple]:
        """Returns dotted option -> (this run's value, the wanted value) where these differ; None is a missing option."""
        names = [name for name in {**self.decided, **wanted} if name not in ignored]
        pairs = {name: (self.decided.get(name), wanted.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def finished_run(directory: str | Path) -> FinishedRun:
    """Reads the record of a finished run; ValueError when the run is missing, unfinished, damaged or of another version."""
    path = Path(directory) / "result.json"
    if not path.exists():
        raise ValueError(f"{directory} is not a finished run (no result.json): run its `python -m src.train ...` command first")
    run = _read(path)
    if not run.is_current:
        raise ValueError(
            f"{directory} was trained by another version of the code: train it again (its record says: {run.command})"
        )
    return run


def _read(path: Path) -> FinishedRun:
    try:
        return FinishedRun(path.parent, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): remove the file and run the run's command again") from error


class RunIndex:
    """The finished runs below ``folder`` (None: ``runs/train``); reads only result.json files."""

    def __init__(self, folder: Path | None = None):
        self.folder = runs_dir() / "train" if folder is None else folder

    def __iter__(self) -> Iterator[FinishedRun]:
        """Runs of this version of the code; prints how many of other versions are left out."""
        others = 0
        for path in sorted(self.folder.glob("*/result.json")):
            if (run := _read(path)).is_current:
                yield run
            else:
                others += 1
        if others:
            print(f"{self.folder}: {others} runs of another version of the code are left out: train them again", flush=True)

    def nearest(
        self, wanted: Mapping[str, object], needed: Callable[[str], bool], ignored: Collection[str] = ()
    ) -> list[tuple[FinishedRun, dict[str, tuple]]]:
        """Returns the runs that agree with ``wanted`` (dotted option -> value) in every ``needed`` option, each with its other
        differences. Runs with the fewest differences come first, and of those the newest."""
        found = [(run, run.differences(wanted, ignored)) for run in self]
        fitting = [(run, differing) for run, differing in found if not any(map(needed, differing))]
        return sorted(fitting, key=lambda pair: (len(pair[1]), -pair[0].finished_s))
