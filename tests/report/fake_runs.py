"""Finished training runs as files, made up: what `src.report` reads, without a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.report.conftest import counts_from

DECIDED = {
    "stage": 1,
    "target": {"_target_": "hyperdflash.targets.load.load_target", "path": "assets/tiny"},
    "reducer": {"_target_": "hyperdflash.drafting.reducers.fc.Fc", "num_streams": None},
    "kl": {"alpha": 0.0, "positions": 2},
    "optim": {"lr": 0.003},
    "seed": 0,
    "init_from": None,
}


def fake_run(directory: Path, decided: dict, rate: float, *, code: str = "a" * 10, prompts: int = 24, **result) -> Path:
    """A run that accepts each slot with probability ``rate``; seeds draw other rounds, all runs share the prompts."""
    directory.mkdir(parents=True)
    seed = decided["seed"]
    counts = counts_from([rate * 0.97**k for k in range(6)], prompts, seed=seed + 1, rounds_low=30, rounds_high=60)
    names = ("emitted", "accepted", "rounds", "survived", "reached")
    rows = [
        {"id": f"p{i:03d}", "domain": ("math", "code", "chat")[i % 3], **{n: getattr(counts, n)[i].tolist() for n in names}}
        for i in range(prompts)
    ]
    tau = float(counts.emitted.sum() / counts.rounds.sum())
    record = {
        "name": directory.name,
        "val_tau": tau,
        "best_checkpoint": "checkpoints/best.ckpt",
        "steps": 40,
        "trainable_parameters": 1000,
        "target": "f" * 16,
        "dataset": {"name": "embedded-stage1", "digest": "d" * 16},
        "init_from": None,
        "command": "python -m src.train",
        "decided_by": decided,
        **result,
    }
    environment = {"git_revision": None, "git_diff": None, "training_code": code, "packages": {"torch": "2.13.0"}}
    (directory / "validation.json").write_text(json.dumps({"tau": tau, "step": 40, "prompts": rows}))
    (directory / "run.json").write_text(json.dumps({"starts": [environment]}))
    rows = [f"{10 * i + 9},{i},{4 - share},{1 + (tau - 1) * share}" for i, share in enumerate((0.3, 0.6, 0.9, 1))]
    (directory / "metrics.csv").write_text("\n".join(["step,epoch,train/loss,val/tau", *rows]) + "\n")
    (directory / "result.json").write_text(json.dumps(record))
    return directory


def fake_sweep(words: list[str], rates, **options) -> list[Path]:
    """A finished run for every job of a sweep; ``rates(job) -> acceptance rate``, None for a missing run."""
    from hyperdflash.launch.sweep_plan import plan_sweep

    made = {}
    for job in plan_sweep(words).jobs:
        rate = rates(job)
        if rate is not None and job.directory not in made:
            deep = "deep" in str(job.decided["target"]["path"])
            made[job.directory] = fake_run(
                job.directory, job.decided, rate, **{"target": ("e" if deep else "f") * 16, **options}
            )
    return list(made)


def noisy(rate: float, seed: int, size: float = 0.004) -> float:
    return rate + size * float(np.random.default_rng(seed).normal())
