"""Finds finished training runs by the options that decide their results, and starts other runs from their weights.
runs/train/<run>/result.json exists when the run is finished: the deciding options, the target's fingerprint, its parent
runs/train/<run>/parent.json the run that this one started from, and its data, as found at its first start"""

import json
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor, nn

from hyperdflash.cli import given_overrides
from hyperdflash.files import read_json, reading
from hyperdflash.identity import RECIPE, decided_by, runs_dir, within_runs
from hyperdflash.record import write_json
from hyperdflash.report.sweep_runs import flat
from hyperdflash.training.checkpoints import read_checkpoint

# Options that a run and its parent share.
SHARED = ("stage", "target", "conditioning", "reducer", "inputs", "lead", "drafter", "head", "seed", "mode", "recipe")
PARENT = "parent.json"
NAMED = r"stage[12]-.+-[0-9a-f]{8}"  # a run's folder, by `run_name`
REMEDY = "remove the file and run the run's command again"  # of a damaged result.json
FOLLOWING = ("init_from", "corpus.stage")  # options that differ between the stages of one command


@dataclass(frozen=True)
class FinishedRun:
    """``record`` is the run's result.json."""

    directory: Path
    record: dict

    @cached_property
    def decided(self) -> dict[str, object]:
        """Dotted option -> value."""
        return flat(self.record.get("decided_by", {}))

    @property
    def is_current(self) -> bool:
        """Tells whether this version of the code would train the same configuration to the same result."""
        return self.decided.get("recipe") == RECIPE

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
        return options.items() <= self.decided.items()

    def differences(self, wanted: Mapping[str, object], ignored: Collection[str] = ()) -> dict[str, tuple]:
        """Returns dotted option -> (this run's value, the wanted value) where these differ; None is a missing option."""
        pairs = {name: (self.decided.get(name), wanted.get(name)) for name in {**self.decided, **wanted}}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in ignored}


def finished_run(directory: str | Path, *names: str) -> FinishedRun:
    """Reads the record of a finished run, which has ``names`` too; ValueError when the run is missing, unfinished, damaged or
    of another version."""
    path = Path(directory) / "result.json"
    if not path.exists():
        raise ValueError(f"{directory} is not a finished run (no result.json): run its `python -m src.train ...` command first")
    run = FinishedRun(path.parent, read_json(path, REMEDY))
    if not run.is_current:
        told = run.record.get("command", "no command")
        raise ValueError(f"{directory} was trained by another version of the code: train it again (its record says: {told})")
    read_json(path, REMEDY, "target", "best_checkpoint", "init_from", *names)
    return run


class RunIndex:
    """The finished runs below ``folder`` (None: ``runs/train``); reads only result.json files."""

    def __init__(self, folder: Path | None = None):
        self.folder = runs_dir() / "train" if folder is None else folder

    def __iter__(self) -> Iterator[FinishedRun]:
        """Yields runs of this version of the code; prints how many of other versions are left out. A copy beside its original
        is no run, and neither is the result of something else, or one that cannot be read in a folder of another name."""
        runs = []
        for path in sorted(self.folder.glob("*/result.json")):
            with reading(path, REMEDY) if re.fullmatch(NAMED, path.parent.name) else suppress(OSError, ValueError):
                record = json.loads(path.read_bytes())
                if isinstance(record, dict) and "decided_by" in record:
                    runs.append(FinishedRun(path.parent, record))
        there = {run.directory.name for run in runs}
        runs = [run for run in runs if run.record.get("name") not in there - {run.directory.name}]
        current = [run for run in runs if run.is_current]
        yield from current
        if others := len(runs) - len(current):
            print(f"{self.folder}: {others} runs of another version of the code are left out: train them again", flush=True)

    def nearest(
        self, wanted: Mapping[str, object], needed: Callable[[str], bool], ignored: Collection[str] = ()
    ) -> list[tuple[FinishedRun, dict[str, tuple]]]:
        """Returns the runs that agree with ``wanted`` (dotted option -> value) in every ``needed`` option, each with its other
        differences. Runs with the fewest differences come first, and of those the newest."""
        found = [(run, run.differences(wanted, ignored)) for run in self]
        fitting = [(run, differing) for run, differing in found if not any(map(needed, differing))]
        return sorted(fitting, key=lambda pair: (len(pair[1]), -pair[0].finished_s))


def find_stage1(config: DictConfig) -> Path:
    """Returns the nearest finished stage-1 run that agrees in the options SHARED; prints what else differs."""
    wanted = flat(decided_by(config)) | {"stage": 1}
    found = RunIndex().nearest(wanted, lambda name: name.partition(".")[0] in SHARED, FOLLOWING)
    if not found:
        overrides = [word for word in given_overrides() if not word.startswith(("experiment=", "init_from="))]
        command = shlex.join(["python", "-m", "src.train", "experiment=stage1", *overrides])
        raise ValueError(
            f"stage 2 continues from a stage-1 run with the same {', '.join(SHARED[1:-1])}, and "
            f"there is none in {runs_dir() / 'train'}: run `{command}` first, or give init_from=<run directory>"
        )
    run, differing = found[0]
    print(f"stage 2 continues from {run.directory}, the nearest of {len(found)} finished stage-1 runs that fit")
    for name, (before, now) in sorted(differing.items()):
        print(f"  differs in {name}: stage 1 had {before}, this run has {now}")
    return run.directory


def parent_of(config: DictConfig, run: Path) -> Path | None:
    """Returns the finished run whose weights ``run`` starts from: named, found, or remembered from its first start."""
    remembered = run / PARENT
    if remembered.exists():
        remedy = f"remove {run} and run its command again"
        return runs_dir() / read_json(remembered, remedy, "init_from")["init_from"]
    parent = Path(config.init_from) if config.init_from else (find_stage1(config) if config.stage == 2 else None)
    if parent is not None:
        data = finished_run(parent).record.get("data")
        write_json(remembered, {"init_from": within_runs(parent), **({"data": data} if data else {})})
    return parent


def data_of(run: Path, digest: str) -> str:
    """Names the data of a run: the digest of its dataset, after those of the run that it started from."""
    remembered = run / PARENT
    before = read_json(remembered, f"remove {run} and run its command again").get("data") if remembered.exists() else None
    return f"{digest} after {before}" if before else digest


def check_target(made_on: str, fingerprint: str, run: Path) -> None:
    """Raises ValueError when a run was made on other weights of the target than those of ``fingerprint``."""
    if made_on != fingerprint:
        raise ValueError(
            f"{run} was trained on the target {made_on}, this one is {fingerprint}: a drafter accepts next to nothing on other "
            "weights; remove that run, or give another target.path or HYPERDFLASH_RUNS"
        )


def load_drafter_weights(drafter: nn.Module, run: Path, target_fingerprint: str) -> None:
    """Loads a finished run's best weights into the new ``drafter``; ValueError for another target's weights or other shapes."""
    checkpoint = read_checkpoint(finished_run(run).best_checkpoint)
    check_target(checkpoint["run"]["target"], target_fingerprint, run)
    load_weights(drafter, {name.removeprefix("drafter."): value for name, value in checkpoint["state_dict"].items()}, run)


def load_weights(drafter: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads ``state`` into ``drafter``, whose frozen lead stays as it is; ValueError for other shapes in ``source``."""
    frozen = {name for name, parameter in drafter.named_parameters() if not parameter.requires_grad}
    state = {name: tensor for name, tensor in drafter.state_dict().items() if name in frozen} | dict(state)
    shapes = [{name: tensor.shape for name, tensor in own.items()} for own in (state, drafter.state_dict())]
    if wrong := {name for name, _ in shapes[0].items() ^ shapes[1].items()}:
        raise ValueError(f"{source} holds a drafter of another shape (first difference: {min(wrong)}): give the options it had")
    drafter.load_state_dict(state)
