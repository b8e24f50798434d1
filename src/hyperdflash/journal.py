"""How the jobs of a multirun ended: one file per job while it runs, a list of the failed jobs at the end.

    <runs>/sweeps/<time>-<pid>/<job>.json    {"job", "directory", "overrides", "params", "status", "error", "seconds"}

Jobs may run in other processes (submitit, joblib); an environment variable tells them the journal's directory. Every use of
Hydra's internals stands in this file.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode

from hyperdflash.files import write_text

PLACE = "HYPERDFLASH_SWEEP"


def jobs_of(words: Sequence[str], config_loader: object = None) -> list[list[str]]:
    """Returns the overrides of each job that Hydra's basic sweeper makes of ``words``; globs need the loader."""
    parser = OverridesParser.create(config_loader)
    return BasicSweeper.split_arguments(parser.parse_overrides(list(words)), None)[0]


@contextmanager
def sweep_journal(directory: Path) -> Iterator[None]:
    """Around a whole command: names the journal of its jobs, and prints the summary when the command ends, however it ends."""
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
    basic = hydra.sweeper._target_.endswith(".BasicSweeper")  # another sweeper searches: its parameters name no jobs
    path, started = Path(os.environ[PLACE]) / f"{hydra.job.num}.json", time.monotonic()
    record = {
        "job": int(hydra.job.num),
        "directory": os.path.relpath(hydra.runtime.output_dir),
        "overrides": list(hydra.overrides.task),
        "params": {key: str(value) for key, value in (hydra.sweeper.get("params") or {}).items()} if basic else None,
        "status": "lost",
        "error": None,
        "seconds": 0.0,
    }
    write_text(path, json.dumps(record, indent=2) + "\n")
    try:
        yield
        record["status"] = "finished"
    except BaseException as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        record |= {"status": "failed" if isinstance(error, Exception) else "stopped", "error": lines[0]}
        print(f"job {record['job']} {record['status']}: {record['error']}", file=sys.stderr, flush=True)
        if isinstance(error, Exception) and not isinstance(error, CompactHydraException):  # not a sentence for the user
            path.with_suffix(".traceback").write_text(traceback.format_exc())
        raise
    finally:
        write_text(path, json.dumps({**record, "seconds": time.monotonic() - started}, indent=2) + "\n")


def summary(place: Path, words: Sequence[str] = ()) -> str:
    """Returns one line for all jobs, then the options, error and directory of each job that did not finish.

    ``words`` of the command say how many jobs it asked for, begun or not.
    """
    records = sorted((json.loads(path.read_text()) for path in place.glob("*.json")), key=lambda record: record["job"])
    others = [record for record in records if record["status"] != "finished"]
    total = len(records)
    if records and (params := records[0].get("params")) is not None:
        own = [word for word in words if "=" in word and not word.startswith(("-", "hydra"))]
        with suppress(HydraException):  # a glob over options needs the configuration's folder
            total = max(total, len(jobs_of([*(f"{key}={value}" for key, value in params.items()), *own])))
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
