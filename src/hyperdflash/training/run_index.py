"""The index of finished training runs: a run is found by what decided its result, whatever else its configuration holds.

runs/train/<run>/result.json      of a finished run: what decided it, the target's fingerprint, its parent
runs/train/<run>/config.yaml      its whole configuration, resolved
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hyperdflash.identity import runs_dir
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
    def finished_s(self) -> float:
        """When it ended, as seconds since the epoch."""
        return (self.directory / "result.json").stat().st_mtime

    @property
    def best_checkpoint(self) -> Path:
        return self.directory / self.record["best_checkpoint"]

    @property
    def parent(self) -> Path | None:
        """The run whose weights this one started from; relative in the record where both lie in one runs folder."""
        return self.directory.absolute().parents[1] / self.record["init_from"] if self.record["init_from"] else None

    def agrees(self, options: Mapping[str, object]) -> bool:
        """Whether the run has all ``options``, whatever others it has."""
        return options.items() <= self.decided.items()

    def differences(self, wanted: Mapping[str, object], ignored: Collection[str] = ()) -> dict[str, tuple]:
        """Dotted option -> (this run's value, the wanted one), where the two differ; None where one has no such option."""
        names = [name for name in {**self.decided, **wanted} if name not in ignored]
        pairs = {name: (self.decided.get(name), wanted.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def finished_run(directory: str | Path) -> FinishedRun:
    """ValueError where the run is not there, not finished or damaged."""
    path = Path(directory) / "result.json"
    if not path.exists():
        raise ValueError(f"{directory} is not a finished run (no result.json): run its `python -m src.train ...` command first")
    try:
        return FinishedRun(Path(directory), json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): remove the file and run the run's command again") from error


class RunIndex:
    """The finished runs below ``folder`` (``runs/train``); reads result.json files alone."""

    def __init__(self, folder: Path | None = None):
        self.folder = runs_dir() / "train" if folder is None else folder

    def __iter__(self) -> Iterator[FinishedRun]:
        return (finished_run(path.parent) for path in sorted(self.folder.glob("*/result.json")))

    def nearest(
        self, wanted: Mapping[str, object], needed: Callable[[str], bool], ignored: Collection[str] = ()
    ) -> list[tuple[FinishedRun, dict[str, tuple]]]:
        """Runs that agree with ``wanted`` (dotted option -> value) in every ``needed`` option, each with its other differences:
        the fewest first, of equally many the newest first."""
        found = [(run, run.differences(wanted, ignored)) for run in self]
        fitting = [(run, differing) for run, differing in found if not any(map(needed, differing))]
        return sorted(fitting, key=lambda pair: (len(pair[1]), -pair[0].finished_s))
