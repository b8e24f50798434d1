"""Kills trainings at random moments, restarts them, and compares their results with an undisturbed one's.

    python -m benchmarks.kills                                 all parts
    python -m benchmarks.kills "training, 2 ranks" --kills 20

A small training on the tiny target (benchmarks/small_training.py), always by the same command. Half of the kills are SIGKILL,
half SIGTERM, to the launcher, one rank, or all; each follows a logged step after a random time, so that most are between two
checkpoints, inside an epoch.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.result import option_parser, run_parts
from benchmarks.small_training import BATCH, STEPS, command_of, finish, last_step, run_of, start
from hyperdflash.report.tables import Block, Table
from hyperdflash.training.checkpoints import newest_checkpoint, step_of
from tests.training.run_differences import run_differences


def measure_trainings(options: Namespace, ranks: int) -> dict:
    """Returns every kill (signal, receiver, last logged step, checkpoint of the next start) and the final differences."""
    draw, total = random.Random(options.seed), options.kills
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        whole, broken = Path(scratch) / "undisturbed", Path(scratch) / "killed"
        command = command_of(Path(scratch) / "cache", batch_size=BATCH // ranks)
        command += ["trainer=ddp_cpu", f"trainer.devices={ranks}"] if ranks > 1 else []
        finish(command, whole)
        shutil.copytree(whole / "responses", broken / "responses")
        kills = []
        for done in tqdm(range(total), desc=f"kills of trainings, {ranks} rank(s)", mininterval=2):
            kills.append(_kill_training(command, broken, draw, ranks, done, total))
            if kills[-1]["step"] is None:
                sys.exit(f"error: the run ended before kill {len(kills)}: {Path(f'{broken}.log').read_text()[-2000:]}")
        finish(command, broken)
        differences = run_differences(run_of(whole), run_of(broken), STEPS)
    return {"ranks": ranks, "steps": STEPS, "kills": kills, "differences": differences}


def _kill_training(command: list[str], runs: Path, draw: random.Random, ranks: int, done: int, total: int) -> dict:
    """Starts the run and kills it once it has passed its share of the steps."""
    process = start(command, runs)
    goal = 1 + draw.randrange(int(done * (STEPS - 6) / total), int((done + 1) * (STEPS - 6) / total) + 1)
    last = None
    while process.poll() is None and (last is None or last < goal):
        time.sleep(0.01)
        last = last_step(runs)
    time.sleep(draw.random() * 0.2)
    name, to, targets = "SIGTERM" if done % 2 else "SIGKILL", "process", [process.pid]
    if ranks > 1:
        to, found = draw.choice(["launcher", "a rank", "all"]), _children(process.pid)
        targets = {"launcher": targets, "a rank": [draw.choice(found)] if found else targets, "all": [*found, *targets]}[to]
    ended = process.poll() is not None
    for pid in targets:
        with suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, name))
    process.wait()
    time.sleep(0.3)  # ranks end a moment after their launcher
    found = newest_checkpoint(run_of(runs) / "checkpoints")
    step = None if ended else last_step(runs)
    return {"signal": name, "to": to, "step": step, "checkpoint": step_of(found) if found else 0}


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def training_blocks(part: dict) -> list[Block]:
    kills, name = part["kills"], f"training, {part['ranks']} rank{'s' * (part['ranks'] > 1)}, {part['steps']} steps"
    again = sum(max(0, k["step"] + 1 - k["checkpoint"]) for k in kills if k["signal"] == "SIGKILL")
    differs = ", ".join(part["differences"]) or "0 tensors, states, metrics and files"
    header = ["part", "kills", "starts", "differences from an undisturbed one", "repeated"]
    return [Table(header, [[name, f"{len(kills)}", f"{len(kills) + 1}", differs, f"{again} steps"]])]


PARTS = {
    "training, 1 rank": (partial(measure_trainings, ranks=1), training_blocks),
    "training, 2 ranks": (partial(measure_trainings, ranks=2), training_blocks),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("kills", __doc__)
    parser.add_argument("--kills", type=int, default=20, help="per part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for caches and runs; by default the system's temporary one")
    record = run_parts(parser, PARTS, arguments)
    if any(part["differences"] for part in record.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
