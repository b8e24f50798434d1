"""Where a run comes from: the stage-1 run that stage 2 continues, and a finished run's weights."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from hyperdflash.cli import command_of, decided_by, runs_dir
from hyperdflash.record import write_json
from hyperdflash.report.sweep_runs import flat


def find_stage1(config: DictConfig) -> Path:
    """The finished stage-1 run with this target, conditioning, reducer, drafter and seed; prints what else differs."""
    wanted = decided_by(config)
    must = ("target", "conditioning", "reducer", "drafter", "seed", "mode", "recipe")
    found = []
    for record in sorted((runs_dir() / "train").glob("*/result.json")):
        decided = read_record(record.parent)["decided_by"]
        if decided["stage"] == 1 and all(decided.get(name) == wanted[name] for name in must):
            differing = _differences(decided, wanted)
            found.append((len(differing), -record.stat().st_mtime, record.parent, differing))
    if not found:
        overrides = [o for o in shlex.split(command_of("src.train"))[3:] if not o.startswith(("experiment=", "init_from="))]
        command = shlex.join(["python", "-m", "src.train", "experiment=stage1", *overrides])
        raise ValueError(
            "stage 2 continues from a stage-1 run with the same target, conditioning, reducer, drafter and seed, and there is "
            f"none in {runs_dir() / 'train'}: run `{command}` first, or give init_from=<run directory>"
        )
    _, _, path, differing = min(found, key=lambda entry: entry[:2])
    print(f"stage 2 continues from {path}")
    for name, (before, now) in differing.items():
        print(f"  differs in {name}: stage 1 had {before}, this run has {now}")
    return path


def _differences(before: dict, now: dict) -> dict[str, tuple]:
    """Dotted option -> (value then, value now), where two runs differ in anything but stage and corpus."""
    olds, news = (
        {name: value for name, value in flat(decided).items() if name not in ("stage", "init_from", "corpus.stage")}
        for decided in (before, now)
    )
    return {n: (olds.get(n), news.get(n)) for n in sorted(olds.keys() | news.keys()) if olds.get(n) != news.get(n)}


def best_checkpoint(run: Path) -> Path:
    """Best checkpoint of a finished run; ValueError where the run is not there or not finished."""
    if not (run / "result.json").exists():
        raise ValueError(f"{run} is not a finished run (no result.json): run its `python -m src.train ...` command first")
    return run / read_record(run)["best_checkpoint"]


def read_record(run: Path) -> dict:
    """result.json of a finished run."""
    path = run / "result.json"
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): remove the file and run the run's command again") from error


def check_target(made_on: str, fingerprint: str, run: Path) -> None:
    """ValueError where a run was made on other weights than those at hand."""
    if made_on != fingerprint:
        raise ValueError(
            f"{run} was trained on the target {made_on}, this one is {fingerprint}: a drafter accepts next to nothing on other "
            "weights; remove that run, or give another target.path or HYPERDFLASH_RUNS"
        )


def parent_of(config: DictConfig, run: Path) -> Path | None:
    """The finished run whose weights ``run`` starts from: named, found, or remembered from its first start."""
    remembered = run / "parent.json"
    if remembered.exists():
        return Path(json.loads(remembered.read_text())["init_from"])
    parent = Path(config.init_from) if config.init_from else (find_stage1(config) if config.stage == 2 else None)
    if parent is not None:
        best_checkpoint(parent)
        write_json(remembered, {"init_from": str(parent)})
    return parent


def load_drafter_weights(drafter: nn.Module, run: Path, target_fingerprint: str) -> None:
    """Put a finished run's best weights into ``drafter``; refuses other weights of the target and other shapes."""
    checkpoint = torch.load(best_checkpoint(run), map_location="cpu", weights_only=True)
    check_target(checkpoint["run"]["target"], target_fingerprint, run)
    state = {k.removeprefix("drafter."): v for k, v in checkpoint["state_dict"].items()}
    own = drafter.state_dict()
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{run} holds a drafter of another shape (first difference: {min(wrong)}): give the options it had")
    drafter.load_state_dict(state)
