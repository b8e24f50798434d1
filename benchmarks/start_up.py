"""How long a user waits: for `python -m src.train --help`, and for the first step of a training whose states are cached.

    python -m benchmarks.start_up --out experiments/<date>-start-up

The training is that of benchmarks/kill_resume.py, on the shipped target, from the command to the first row of metrics.csv; one
run before it fills the cache. Wall time, so nothing else should be at work. Writes start_up.md and start_up.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.kill_resume import OPTIONS, finish, last_step, start
from hyperdflash.cli import runs_dir
from hyperdflash.files import write_text
from hyperdflash.record import environment_record, script_command, write_json
from hyperdflash.report.tables import markdown_table

BARS = {"--help": 3.0, "first step": 15.0}  # seconds, at most


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=runs_dir() / "start-up")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    found: dict[str, list[float]] = {name: [] for name in BARS}
    with tempfile.TemporaryDirectory() as folder:
        places = [f"corpus.directory={runs_dir().resolve() / 'corpus'}", f"cache.directory={folder}/cache"]
        command = [sys.executable, "-m", "src.train", *OPTIONS, *places]
        finish([*command, "trainer.max_epochs=1"], Path(folder) / "warm")
        for number in tqdm(range(options.rounds), desc="start-up", unit="round", mininterval=2):
            found["--help"].append(help_s())
            found["first step"].append(first_step_s(command, Path(folder) / str(number)))
    record = {"seconds": found, **environment_record(script_command("benchmarks.start_up", arguments))}
    write_json(options.out / "start_up.json", record)
    rows = []
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        rows.append([name, f"{middle:.1f}", spread, f"{BARS[name]:.0f}", "met" if middle <= BARS[name] else "**not met**"])
    text = "\n".join([*markdown_table(["", "median, s", "from, to", "at most", ""], rows), ""])
    write_text(options.out / "start_up.md", text)
    print(text)


if __name__ == "__main__":
    main()
