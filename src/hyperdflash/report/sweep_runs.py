"""Reads finished training runs for a sweep's report: their options, counts per validation prompt, and tau by step. 1. run
directory result.json, validation.json, metrics.csv, run.json -> TrainedRun 2. marks runs to compare with caution"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from hyperdflash.files import read_json
from hyperdflash.record import read_starts
from hyperdflash.report.bootstrap import PromptCounts


@dataclass(frozen=True)
class TrainedRun:
    """``decided`` dotted option -> value; ``counts`` a row per prompt (``prompt_ids``, ``domains``) at the best checkpoint;
    ``curve`` [V, 2] step and validation tau, ``losses`` [L, 2] step and training loss; ``code`` a digest of the modules that a
    training can reach, and torch's version; ``dataset`` its name, and digests of it and of those of the runs that it started
    from; ``choices`` axis -> value in the sweep, without seed and target."""

    directory: Path
    decided: dict[str, object]
    fingerprint: str
    steps: int
    parameters: int
    prompt_ids: tuple[str, ...]
    domains: tuple[str, ...]
    counts: PromptCounts
    curve: np.ndarray
    losses: np.ndarray
    code: str
    dataset: tuple[str, str]
    choices: dict[str, str] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.decided["seed"])

    @property
    def target(self) -> str:
        return Path(str(self.decided["target.path"])).name


def read_run(directory: Path, choices: dict[str, str] | None = None) -> TrainedRun:
    """Reads a run's directory; ValueError where the run is not finished or has no counts per prompt."""
    result = _json(directory / "result.json", "is not finished: run its command again")
    if "dataset" not in result:
        raise ValueError(f"{directory} names no dataset, so earlier code made it: remove it and run its command again")
    kept = _json(directory / "validation.json", "keeps no counts per prompt: remove it and run its command again", "prompts")
    prompts = sorted(kept["prompts"], key=lambda row: row["id"])
    # one that was resumed under other code names both
    codes = [f"code {start['training_code']}, torch {start['packages']['torch']}" for start in read_starts(directory)]
    return TrainedRun(
        directory=directory,
        decided=flat(result["decided_by"]),
        fingerprint=result["target"],
        steps=result["steps"],
        parameters=result["trainable_parameters"],
        prompt_ids=tuple(row["id"] for row in prompts),
        domains=tuple(row["domain"] for row in prompts),
        counts=PromptCounts(*(np.array([row[f.name] for row in prompts], dtype=np.int64) for f in fields(PromptCounts))),
        curve=read_curve(directory, "val/tau"),
        losses=read_curve(directory, "train/loss"),
        code=" then ".join(dict.fromkeys(codes)) or "unknown",
        dataset=(result["dataset"]["name"], result.get("data", result["dataset"]["digest"])),
        choices=choices or {},
    )


def read_curve(directory: Path, metric: str) -> np.ndarray:
    """Returns [V, 2] float64 of optimizer steps and ``metric`` from metrics.csv; empty where the run wrote none."""
    path = directory / "metrics.csv"
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else ()
    points = [(int(row["step"]) + 1, float(row[metric])) for row in rows if row.get(metric)]
    return np.array(sorted(points), dtype=np.float64).reshape(-1, 2)


def flat(decided: dict) -> dict[str, object]:
    """Flattens nested options into dotted ones."""
    out: dict[str, object] = {}
    for name, value in decided.items():
        out |= {f"{name}.{key}": inner for key, inner in flat(value).items()} if isinstance(value, dict) else {name: value}
    return out


def marks(runs: Sequence[TrainedRun]) -> dict[Path, str]:
    """Returns the runs to compare with caution, and why: made by other code than most, or on other rows of the same dataset."""
    codes = Counter(run.code for run in runs).most_common()
    digests: dict[str, Counter[str]] = {}
    for run in runs:
        digests.setdefault(run.dataset[0], Counter())[run.dataset[1]] += 1
    found: dict[Path, list[str]] = {}
    for run in runs:
        if run.code != (most := codes[0][0]):
            found.setdefault(run.directory, []).append(f"made by other code ({run.code}; most runs: {most})")
        name, digest = run.dataset
        if digest != (most := digests[name].most_common(1)[0][0]):
            reason = f"trained on other rows of dataset {name} ({digest}; most runs: {most})"
            found.setdefault(run.directory, []).append(reason)
    return {directory: "; ".join(reasons) for directory, reasons in found.items()}


def _json(path: Path, otherwise: str, *names: str) -> dict:
    if not path.exists():
        raise ValueError(f"{path.parent} {otherwise}")
    return read_json(path, "remove the run's directory and run its command again", *names)
