"""Starts a small training as a user does, in its own processes: 60 steps of the shipped tiny target's drafter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hyperdflash.identity import runs_dir

STEPS, BATCH = 60, 12  # 64 documents in 6 steps per epoch
OPTIONS = [
    "experiment=stage1",
    "logger=csv",
    "corpus.stage1={chat: 22, code: 21, math: 21}",
    "corpus.responses=original",
    "corpus.validation=2",
    "corpus.max_new_tokens=32",
    "corpus.max_length=256",
    "cache.documents_per_shard=8",
    "trainer.max_epochs=10",
    "trainer.threads=1",
    "trainer.log_every_n_steps=1",
    "trainer.checkpoint_every_steps=5",
]


def command_of(cache: Path, batch_size: int = BATCH) -> list[str]:
    """Returns the training's command, with states in ``cache`` and the corpus in this folder of runs."""
    places = [f"corpus.directory={runs_dir().resolve() / 'corpus'}", f"cache.directory={cache.resolve()}"]
    return [sys.executable, "-m", "src.train", *OPTIONS, *places, f"optim.batch_size={batch_size}"]


def start(command: list[str], runs: Path) -> subprocess.Popen:
    """Starts the command with its runs in ``runs`` and its output in ``runs``.log."""
    environment = {**os.environ, "HYPERDFLASH_RUNS": str(runs), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    runs.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{runs}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(command: list[str], runs: Path) -> None:
    if start(command, runs).wait() != 0:
        sys.exit(f"error: the training failed: {Path(f'{runs}.log').read_text()[-2000:]}")


def run_of(runs: Path) -> Path:
    """Returns the only run in ``runs``."""
    (run,) = (runs / "train").iterdir()
    return run


def last_step(runs: Path) -> int | None:
    """Returns the last step that the run has logged, None before the first."""
    rows = list((runs / "train").glob("*/metrics.csv"))
    lines = rows[0].read_text().splitlines()[1:] if rows else []
    return int(lines[-1].split(",")[0]) if lines and lines[-1].split(",")[0].isdigit() else None
