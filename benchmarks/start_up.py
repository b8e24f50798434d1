"""Measures how long a user waits for `python -m src.train --help`, and for the first step of a training with cached states.

    python -m benchmarks.start_up

The training is that of benchmarks/small_training.py, from the command to the first row of metrics.csv; one run before it fills
the cache. Times are wall time, so the machine should do nothing else.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks.result import in_turn, option_parser, run, seconds, verdict
from benchmarks.small_training import command_of, finish, last_step, start
from hyperdflash.report.tables import Block, Table

THRESHOLDS = {"--help": 3.0, "first step": 15.0}  # seconds, at most


def help_s() -> float:
    command = [sys.executable, "-m", "src.train", "--help"]
    return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))


def first_step_s(command: list[str], runs: Path) -> float:
    """Returns the seconds until a new run in ``runs`` has logged a step, and kills the run."""
    started = time.monotonic()
    process = start(command, runs)
    while last_step(runs) is None:
        if process.poll() is not None:
            sys.exit(f"error: the training ended before its first step: see {runs}.log")
        time.sleep(0.01)
    taken = time.monotonic() - started
    process.kill()
    process.wait()
    return taken


def measure(options: Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = command_of(Path(folder) / "cache")
        finish([*command, "trainer.max_epochs=1"], Path(folder) / "warm")
        sides = {"--help": lambda _: help_s(), "first step": lambda n: first_step_s(command, Path(folder) / str(n))}
        return {"seconds": in_turn(sides, options.rounds, "start-up", warm_up=0)}


def blocks(record: dict) -> list[Block]:
    rows = []
    for name, found in record["seconds"].items():
        middle, most = statistics.median(found), THRESHOLDS[name]
        rows.append([name, f"{middle:.1f}", f"{min(found):.1f} to {max(found):.1f}", f"{most:.0f}", verdict(middle <= most)])
    return [Table(["", "median, s", "from, to", "at most", ""], rows)]


def main(arguments: Sequence[str] | None = None) -> None:
    run(option_parser("start_up", __doc__, rounds=5), measure, blocks, arguments)


if __name__ == "__main__":
    main()
