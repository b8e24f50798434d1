"""How the jobs of a multirun ended: a file a job while it runs, a list of those that failed at the end.

    <runs>/sweeps/<time>-<pid>/<job>.json    {"job", "directory", "overrides", "params", "status", "error", "seconds"}

Jobs may run in other processes (submitit, joblib): the journal's place reaches them by the environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from hyperdflash.files import write_text

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
            print(summary(place, sys.argv[1:]), file=sys.stderr, flush=True)


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
        "params": _params(hydra),
        "status": "lost",
        "error": None,
        "seconds": 0.0,
    }
    write_text(path, json.dumps(record, indent=2) + "\n")
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
        write_text(path, json.dumps({**record, "seconds": time.monotonic() - started}, indent=2) + "\n")


def summary(place: Path, words: Sequence[str] = ()) -> str:
    """One line for all jobs, then one for each that did not finish: its options, error and directory.

    ``words`` of the command say how many jobs it asked for, begun or not.
    """
    records = sorted((json.loads(path.read_text()) for path in place.glob("*.json")), key=lambda record: record["job"])
    others = [record for record in records if record["status"] != "finished"]
    total = max(len(records), _asked(words, records[0].get("params") if records else None))
    lines = [f"{total} jobs: {len(records) - len(others)} finished, {len(others)} not"]
    if total > len(records):
        lines[0] += f", {total - len(records)} never begun"
    for record in others:
        lines.append(f"  {record['status']}: {' '.join(record['overrides'])}")
        lines.append(f"    {record['error'] or 'its process ended without a word'}")
        lines.append(f"    {record['directory']}")
    if others or total > len(records):
        lines.append("the same command skips what is finished and goes on with the rest")
    return "\n".join(lines)


def _params(hydra: DictConfig) -> dict[str, str] | None:
    """The swept parameters, as the basic sweeper spells them; None for a sweeper that searches."""
    if not hydra.sweeper._target_.endswith(".BasicSweeper"):
        return None
    return {key: str(value) for key, value in (hydra.sweeper.get("params") or {}).items()}


def _asked(words: Sequence[str], params: dict[str, str] | None) -> int:
    """How many jobs the basic sweeper makes of these; 0 where that cannot be told."""
    if params is None:
        return 0
    own = [word for word in words if "=" in word and not word.startswith(("-", "hydra"))]
    try:
        overrides = OverridesParser.create().parse_overrides([*(f"{key}={value}" for key, value in params.items()), *own])
        return len(BasicSweeper.split_arguments(overrides, None)[0])
    except HydraException:  # a glob over options needs the configuration's folder
        return 0


def _sentence(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
