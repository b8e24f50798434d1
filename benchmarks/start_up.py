"""How long a user waits: for `python -m src.train --help`, and for the first step of a training whose states are cached.

    python -m benchmarks.start_up

The training is that of benchmarks/small_training.py, from the command to the first row of metrics.csv; one run before it fills
the cache. Wall time, so nothing else should be at work.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.result import environment, option_parser, write_result
from benchmarks.small_training import command_of, finish, last_step, start
from hyperdflash.report.tables import markdown_table

THRESHOLDS = {"--help": 3.0, "first step": 15.0}  # seconds, at most


def help_s() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "src.train", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def first_step_s(command: list[str], runs: Path) -> float:
    """Until a new run in ``runs`` has logged a step; the run is then killed."""
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


def table(found: dict[str, list[float]]) -> list[str]:
    rows = []
    for name, seconds in found.items():
        middle, most = statistics.median(seconds), THRESHOLDS[name]
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        rows.append([name, f"{middle:.1f}", spread, f"{most:.0f}", "met" if middle <= most else "**not met**"])
    return markdown_table(["", "median, s", "from, to", "at most", ""], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options = option_parser("start_up", __doc__, rounds=5).parse_args(arguments)
    measured_in = environment("start_up", arguments)
    found: dict[str, list[float]] = {name: [] for name in THRESHOLDS}
    with tempfile.TemporaryDirectory() as folder:
        command = command_of(Path(folder) / "cache")
        finish([*command, "trainer.max_epochs=1"], Path(folder) / "warm")
        for number in tqdm(range(options.rounds), desc="start-up", unit="round", mininterval=2):
            found["--help"].append(help_s())
            found["first step"].append(first_step_s(command, Path(folder) / str(number)))
    write_result(options.out, "start_up", {"seconds": found}, table(found), measured_in)


if __name__ == "__main__":
    main()
