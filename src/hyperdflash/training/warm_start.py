"""Warm starts: finds the stage-1 run that stage 2 continues, and loads a finished run's weights."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from hyperdflash.cli import command_of
from hyperdflash.identity import decided_by, runs_dir, within_runs
from hyperdflash.record import write_json
from hyperdflash.report.sweep_runs import flat
from hyperdflash.training.run_index import RunIndex, finished_run

SHARED = ("stage", "target", "conditioning", "reducer", "drafter", "head", "seed", "mode", "recipe")  # by a run and its parent
FOLLOWING = ("init_from", "corpus.stage")  # options that differ between the stages of one command


def find_stage1(config: DictConfig) -> Path:
    """The finished stage-1 run with this target, conditioning, reducer, drafter, head and seed; prints what else differs."""
    wanted = flat(decided_by(config)) | {"stage": 1}
    found = RunIndex().nearest(wanted, lambda name: name.partition(".")[0] in SHARED, FOLLOWING)
    if not found:
        overrides = [o for o in shlex.split(command_of("src.train"))[3:] if not o.startswith(("experiment=", "init_from="))]
        command = shlex.join(["python", "-m", "src.train", "experiment=stage1", *overrides])
        raise ValueError(
            "stage 2 continues from a stage-1 run with the same target, conditioning, reducer, drafter, head and seed, and "
            f"there is none in {runs_dir() / 'train'}: run `{command}` first, or give init_from=<run directory>"
        )
    run, differing = found[0]
    print(f"stage 2 continues from {run.directory}")
    for name, (before, now) in sorted(differing.items()):
        print(f"  differs in {name}: stage 1 had {before}, this run has {now}")
    return run.directory


def parent_of(config: DictConfig, run: Path) -> Path | None:
    """The finished run whose weights ``run`` starts from: named, found, or remembered from its first start."""
    remembered = run / "parent.json"
    if remembered.exists():
        return runs_dir() / json.loads(remembered.read_text())["init_from"]
    parent = Path(config.init_from) if config.init_from else (find_stage1(config) if config.stage == 2 else None)
    if parent is not None:
        finished_run(parent)
        write_json(remembered, {"init_from": within_runs(parent)})
    return parent


def check_target(made_on: str, fingerprint: str, run: Path) -> None:
    """ValueError where a run was made on other weights than those at hand."""
    if made_on != fingerprint:
        raise ValueError(
            f"{run} was trained on the target {made_on}, this one is {fingerprint}: a drafter accepts next to nothing on other "
            "weights; remove that run, or give another target.path or HYPERDFLASH_RUNS"
        )


def load_drafter_weights(drafter: nn.Module, run: Path, target_fingerprint: str) -> None:
    """Put a finished run's best weights into ``drafter``; refuses other weights of the target and other shapes."""
    checkpoint = torch.load(finished_run(run).best_checkpoint, map_location="cpu", weights_only=True)
    check_target(checkpoint["run"]["target"], target_fingerprint, run)
    state = {k.removeprefix("drafter."): v for k, v in checkpoint["state_dict"].items()}
    own = drafter.state_dict()
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{run} holds a drafter of another shape (first difference: {min(wrong)}): give the options it had")
    drafter.load_state_dict(state)
