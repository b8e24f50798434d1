"""How the jobs of a multirun ended: a file a job while it runs, a list of those that failed at the end.

    <runs>/sweeps/<time>-<pid>/<job>.json    {"job", "directory", "overrides", "status", "error", "seconds"}

Jobs may run in other processes (submitit, joblib): the journal's place reaches them by the environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

PLACE = "HYPERDFLASH_SWEEP"


@contextmanager
def sweep_journal(directory: Path) -> Iterator[None]:
    """Around a whole command: where its jobs write, and what they wrote once it ends, however it ends."""
    place = directory / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}"
    os.environ[PLACE] = str(place.resolve())
    try:
        yield
    finally:
        del os.environ[PLACE]
        if place.exists():
            print(summary(place), file=sys.stderr, flush=True)


@contextmanager
def journal_entry() -> Iterator[None]:
    """Around one job; does nothing outside a multirun."""
    if PLACE not in os.environ or not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        yield
        return
    hydra = HydraConfig.get()
    path, started = Path(os.environ[PLACE]) / f"{hydra.job.num}.json", time.monotonic()
    record = {
        "job": int(hydra.job.num),
        "directory": os.path.relpath(hydra.runtime.output_dir),
        "overrides": list(hydra.overrides.task),
        "status": "lost",
        "error": None,
        "seconds": 0.0,
    }
    _write(path, record)
    try:
        yield
        record["status"] = "finished"
    except BaseException as error:
        record |= {"status": "failed" if isinstance(error, Exception) else "stopped", "error": _sentence(error)}
        print(f"job {record['job']} {record['status']}: {record['error']}", file=sys.stderr, flush=True)
        if isinstance(error, Exception) and not isinstance(error, CompactHydraException):  # not a sentence for the user
            (path.parent / f"{record['job']}.traceback").write_text(traceback.format_exc())
        raise
    finally:
        _write(path, {**record, "seconds": time.monotonic() - started})


def summary(place: Path) -> str:
    """One line for all jobs, then one for each that did not finish: its options, error and directory."""
    records = sorted((json.loads(path.read_text()) for path in place.glob("*.json")), key=lambda record: record["job"])
    others = [record for record in records if record["status"] != "finished"]
    lines = [f"{len(records)} jobs: {len(records) - len(others)} finished, {len(others)} not"]
    for record in others:
        lines.append(f"  {record['status']}: {' '.join(record['overrides'])}")
        lines.append(f"    {record['error'] or 'its process ended without a word'}")
        lines.append(f"    {record['directory']}")
    if others:
        lines.append("the same command skips what is finished and goes on with the rest")
    return "\n".join(lines)


def _sentence(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)
