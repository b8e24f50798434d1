"""Kill a training at random points, let the same command go on each time, and compare the end with an undisturbed run's.

python -m benchmarks.kill_resume --kills 20
python -m benchmarks.kill_resume --kills 20 --ranks 2

The training is the shipped tiny target's, small: 64 documents for 60 steps, on the corpus in this folder of runs. Half of the
kills are SIGKILL, half SIGTERM; with several ranks either goes to the launcher, one of the ranks, or all. Every kill comes a
random time after a step was logged, so most fall between two checkpoints, inside an epoch. Writes kill_resume.json and a
Markdown table.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from hyperdflash.cli import runs_dir
from hyperdflash.record import environment_record, write_json
from hyperdflash.report.tables import markdown_table
from hyperdflash.training.checkpoints import newest_checkpoint, step_of
from hyperdflash.training.run_differences import run_differences

STEPS = 60
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


def main(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if arguments.kills < 0 or arguments.ranks not in (1, 2, 3, 4, 6, 12):
        sys.exit("error: --kills must be 0 or more, and --ranks divide a step's 12 documents: 1, 2, 3, 4, 6 or 12")
    if out.exists():
        sys.exit(f"error: {out} exists: remove it or give another --out")
    batch = 12 // arguments.ranks  # 64 documents in 6 steps an epoch
    places = [f"corpus.directory={runs_dir().resolve() / 'corpus'}", f"cache.directory={out.resolve() / 'cache'}"]
    options = [*OPTIONS, *places, f"optim.batch_size={batch}"]
    if arguments.ranks > 1:
        options = ["trainer=ddp_cpu", *options, f"trainer.devices={arguments.ranks}"]
    command = [sys.executable, "-m", "src.train", *options]
    draw = random.Random(arguments.seed)

    whole = out / "undisturbed"
    print("undisturbed run", flush=True)
    started = time.monotonic()
    finish(command, whole)
    print(f"  {time.monotonic() - started:.0f} s", flush=True)
    broken = out / "killed"
    shutil.copytree(whole / "responses", broken / "responses")
    kills = []
    while len(kills) < arguments.kills:
        kills.append(_kill_once(command, broken, draw, arguments.ranks, len(kills), arguments.kills))
        if kills[-1]["step"] is None:
            sys.exit(f"error: the run ended before kill {len(kills)}: see {broken}.log")
        print(f"  {kills[-1]}", flush=True)
    finish(command, broken)
    differences = run_differences(_run(whole), _run(broken), STEPS)
    record = {
        "made_by": environment_record(shlex.join(["python", "-m", "benchmarks.kill_resume", *sys.argv[1:]])),
        "ranks": arguments.ranks,
        "steps": STEPS,
        "kills": kills,
        "differences": differences,
    }
    write_json(out / "kill_resume.json", record)
    rows = [[str(i + 1), k["signal"], k["to"], str(k["step"]), str(k["checkpoint"])] for i, k in enumerate(kills)]
    table = markdown_table(["kill", "signal", "to", "last step logged", "goes on from step"], rows)
    end = "the end is the undisturbed run's, bit for bit" if not differences else f"differs: {', '.join(differences)}"
    text = "\n".join([*table, "", f"{len(kills)} kills, {arguments.ranks} rank(s), {STEPS} steps: {end}", ""])
    (out / "kill_resume.md").write_text(text)
    print(text)
    return 1 if differences else 0


def start(command: list[str], runs: Path) -> subprocess.Popen:
    environment = {**os.environ, "HYPERDFLASH_RUNS": str(runs), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    runs.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{runs}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(command: list[str], runs: Path) -> None:
    if start(command, runs).wait() != 0:
        sys.exit(f"error: the training failed: see {runs}.log")


def _kill_once(command: list[str], runs: Path, draw: random.Random, ranks: int, done: int, kills: int) -> dict:
    """Start the run and kill it once it has come a little further than ever: its share of the steps."""
    process = start(command, runs)
    goal = 1 + draw.randrange(int(done * (STEPS - 6) / kills), int((done + 1) * (STEPS - 6) / kills) + 1)
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
    found = newest_checkpoint(_run(runs) / "checkpoints")
    where = None if ended else last_step(runs)
    return {"signal": name, "to": to, "step": where, "checkpoint": step_of(found) if found else 0}


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _run(runs: Path) -> Path:
    (run,) = (runs / "train").iterdir()
    return run


def last_step(runs: Path) -> int | None:
    rows = list((runs / "train").glob("*/metrics.csv"))
    lines = rows[0].read_text().splitlines()[1:] if rows else []
    return int(lines[-1].split(",")[0]) if lines and lines[-1].split(",")[0].isdigit() else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(runs_dir() / "kill-resume"))
    sys.exit(main(parser.parse_args()))
