"""Reads finished training runs for a sweep's report: their options, counts per validation prompt, and tau by step.

1. run directory   result.json, validation.json, metrics.csv, run.json  ->  TrainedRun
2. members         a run and its place in the sweep: choices by axis, seed, target  ->  Member
3. what differs    dotted options in which runs differ that the axes do not name
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hyperdflash.record import read_starts
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.measure import COUNTS, Sample

SEED, TARGET = "seed", "target"
NOT_AN_AXIS = (SEED, TARGET, "init_from")


@dataclass(frozen=True)
class TrainedRun:
    """``decided`` dotted option -> value; ``counts`` a row per prompt (``prompt_ids``, ``domains``) at the best checkpoint;
    ``curve`` [V, 2] step and validation tau of every validation; ``code`` a digest of the modules that a
    training can reach, and torch's version; ``dataset`` the name, which follows from the configuration, and the digest."""

    directory: Path
    decided: dict[str, object]
    fingerprint: str
    steps: int
    parameters: int
    prompt_ids: tuple[str, ...]
    domains: tuple[str, ...]
    counts: PromptCounts
    curve: np.ndarray
    code: str
    dataset: tuple[str, str]
    parent: dict[str, object] | None = None

    @property
    def sample(self) -> Sample:
        """Its counts of a replay at temperature 0."""
        return Sample(self.directory.name, 0.0, self.prompt_ids, self.domains, self.counts, np.zeros(len(self.domains), bool))

    @property
    def seed(self) -> int:
        return int(self.decided[SEED])

    @property
    def target(self) -> str:
        return Path(str(self.decided["target.path"])).name


@dataclass(frozen=True)
class Member:
    """A run in a sweep; ``choices`` axis -> value, without seed and target."""

    run: TrainedRun
    choices: dict[str, str]


def read_run(directory: Path) -> TrainedRun:
    """Reads a run's directory; ValueError where the run is not finished or has no counts per prompt."""
    result = _json(directory / "result.json", "is not finished: run its command again")
    if "dataset" not in result:
        raise ValueError(f"{directory} names no dataset, so earlier code made it: remove it and run its command again")
    kept = _json(
        directory / "validation.json",
        "keeps no counts per prompt (validation.json): remove its directory and run its command again",
    )
    prompts = sorted(kept["prompts"], key=lambda row: row["id"])
    counts = PromptCounts(**{name: np.array([row[name] for row in prompts], dtype=np.int64) for name in COUNTS})
    parent = None
    started_from = directory.absolute().parents[1] / (result["init_from"] or "nowhere") / "result.json"
    if started_from.exists():
        parent = flat(json.loads(started_from.read_text())["decided_by"])
    return TrainedRun(
        directory=directory,
        decided=flat(result["decided_by"]),
        fingerprint=result["target"],
        steps=result["steps"],
        parameters=result["trainable_parameters"],
        prompt_ids=tuple(row["id"] for row in prompts),
        domains=tuple(row["domain"] for row in prompts),
        counts=counts,
        curve=read_curve(directory),
        code=_code(directory),
        dataset=(result["dataset"]["name"], result["dataset"]["digest"]),
        parent=parent,
    )


def read_curve(directory: Path) -> np.ndarray:
    """Returns [V, 2] float64 of optimizer steps and val/tau from metrics.csv; empty where the run wrote none."""
    path = directory / "metrics.csv"
    if not path.exists():
        return np.zeros((0, 2))
    with path.open(newline="") as lines:
        points = [(int(row["step"]) + 1, float(row["val/tau"])) for row in csv.DictReader(lines) if row.get("val/tau")]
    return np.array(sorted(points), dtype=np.float64).reshape(-1, 2)


def flat(decided: dict) -> dict[str, object]:
    """Flattens nested options into dotted ones."""
    out: dict[str, object] = {}
    for name, value in decided.items():
        if isinstance(value, dict):
            out |= {f"{name}.{key}": inner for key, inner in flat(value).items()}
        else:
            out[name] = value
    return out


def differing(runs: Iterable[dict[str, object]]) -> dict[str, tuple]:
    """Returns the dotted options in which ``runs`` differ, without seed and target, with their values."""
    runs = list(runs)
    names = dict.fromkeys(name for run in runs for name in run)
    found = {}
    for name in names:
        if name.split(".")[0] in NOT_AN_AXIS:
            continue
        values = tuple(dict.fromkeys(_hashable(run.get(name)) for run in runs))
        if len(values) > 1:
            found[name] = values
    return found


def members_by_difference(runs: Sequence[TrainedRun]) -> list[Member]:
    """Groups runs without a plan: by the head of their name (stage1-pre_hc_head-hc_gate-kl0.15), and by every option in which
    runs of one head differ; an option that a run lacks is ""."""
    heads: dict[str, list[TrainedRun]] = {}
    for run in runs:
        heads.setdefault(run.directory.name.partition("-s")[0], []).append(run)
    extra = list(dict.fromkeys(name for group in heads.values() for name in differing(run.decided for run in group)))
    members = []
    for head, group in heads.items():
        for run in group:
            own = {name: value_text(run.decided[name]) if name in run.decided else "" for name in extra}
            members.append(Member(run, {"run": head, **own}))
    return members


def value_text(value: object) -> str:
    """Writes a value as on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def refusal(run: TrainedRun, jobs: Sequence[dict[str, object]]) -> str:
    """Explains why a run is none of ``jobs`` (flat options each): its differences from the nearest, without seed and target."""
    distances = [differing([run.decided, job]) for job in jobs]
    nearest = min(distances, key=len)
    if not nearest:
        return "is of another seed or target than the sweep asks for"
    shown = [f"{name} is {value_text(here)} where the sweep has {value_text(there)}" for name, (here, there) in nearest.items()]
    return "differs in more than the axes: " + ", ".join(shown)


def marks(members: Sequence[Member]) -> dict[Path, str]:
    """Returns the runs to compare with caution, and why: other code or rows than most, or another start than its options."""
    codes = [member.run.code for member in members]
    usual = max(dict.fromkeys(codes), key=codes.count) if codes else ""
    digests: dict[str, Counter[str]] = {}
    for member in members:
        name, digest = member.run.dataset
        digests.setdefault(name, Counter())[digest] += 1
    found = {}
    for member in members:
        run, reasons = member.run, []
        if run.code != usual:
            reasons.append(f"made by other code ({run.code}; most runs: {usual})")
        name, digest = run.dataset
        if digest != (most := digests[name].most_common(1)[0][0]):
            reasons.append(f"trained on other rows of dataset {name} ({digest}; most runs: {most})")
        if run.parent is not None:
            other = [n for n in differing([run.parent, run.decided]) if n not in ("stage", "corpus.stage", "optim.lr")]
            if other:
                reasons.append("its stage-1 run differs in " + ", ".join(other))
        if reasons:
            found[run.directory] = "; ".join(reasons)
    return found


def _code(directory: Path) -> str:
    """The code of every start, in order: one that was resumed under other code names both."""
    starts = [f"code {start['training_code']}, torch {start['packages']['torch']}" for start in read_starts(directory)]
    return " then ".join(dict.fromkeys(starts)) or "unknown"


def _json(path: Path, otherwise: str) -> dict:
    if not path.exists():
        raise ValueError(f"{path.parent} {otherwise}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): remove the run's directory and run its command again") from error


def _hashable(value: object) -> object:
    return str(value) if isinstance(value, list) else value
