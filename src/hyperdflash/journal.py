"""How the jobs of a multirun ended: one file per job while it runs, a list of the failed jobs at the end.

    <runs>/sweeps/<time>-<pid>/<job>.json    {"job", "directory", "overrides", "params", "status", "error", "seconds"}

Jobs may run in other processes (submitit, joblib); an environment variable tells them the journal's directory. A job that fails
stops no other, wherever it fails. Every use of Hydra's internals stands in this file.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra._internal.hydra as hydra_process
import hydra._internal.utils as hydra_utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from hyperdflash.files import fault_of, write_text
from hyperdflash.settings import no_option

PLACE = "HYPERDFLASH_SWEEP"
NOT_COMPOSED = "not_composed"  # key of the sentence in the configuration of a job that could not be composed
TYPED_AXES = "HYPERDFLASH_AXES"  # the options with several values on the command line


def jobs_of(words: Sequence[str], config_loader: object = None) -> list[list[str]]:
    """Returns the overrides of each job that Hydra's basic sweeper makes of ``words``; globs need the loader."""
    parser = OverridesParser.create(config_loader)
    return BasicSweeper.split_arguments(parser.parse_overrides(list(words)), None)[0]


class JobLoader(ConfigLoaderImpl):
    """Hydra's composition; a job of a sweep that cannot be composed becomes one that fails with its sentence when it runs."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        try:
            return super().load_sweep_config(master_config, sweep_overrides)
        except Exception as error:
            config = super().load_sweep_config(master_config, [])
            with open_dict(config):
                config[NOT_COMPOSED] = cause_of(error)
                config.hydra.overrides.task = list(sweep_overrides)
            return config


@contextmanager
def sweep_journal(directory: Path) -> Iterator[None]:
    """Around a whole command: names the journal of its jobs, and prints the summary when the command ends, however it ends.
    Hydra raises its errors here and prints none. Exits with code 1 when a job of its basic sweeper has failed."""
    place = directory / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}"
    typed = []
    with suppress(HydraException):  # the command itself says what Hydra cannot read
        typed = OverridesParser.create().parse_overrides([word for word in sys.argv[1:] if "=" in word])
    axes = [one.input_line.partition("=")[0] for one in typed if one.is_sweep_override()]
    os.environ |= {PLACE: str(place.absolute()), TYPED_AXES: " ".join(axes)}
    before = hydra_process.ConfigLoaderImpl, hydra_utils.run_and_report, JobReturn.return_value
    hydra_process.ConfigLoaderImpl, hydra_utils.run_and_report = JobLoader, lambda function: function()
    JobReturn.return_value = property(result_of, JobReturn.return_value.fset)
    try:
        yield
    finally:
        hydra_process.ConfigLoaderImpl, hydra_utils.run_and_report, JobReturn.return_value = before
        del os.environ[PLACE], os.environ[TYPED_AXES]
        if place.exists():
            print(summary(place, sys.argv[1:]), file=sys.stderr, flush=True)
    if any(record["status"] == "failed" and record["params"] is not None for record in _records(place)):
        sys.exit(1)


def result_of(job: JobReturn) -> object:
    """Returns what a job returned, or raises its error, without the line that Hydra prints before it."""
    if job.status == JobStatus.FAILED:
        raise job._return_value
    return job._return_value


@contextmanager
def journal_entry(directory_of: Callable[[], str | None]) -> Iterator[None]:
    """Around one job, which writes into a folder that ``directory_of`` names; does nothing outside a multirun. Passes an error
    on to a sweeper that searches, and not to Hydra's basic one, which would end there."""
    if PLACE not in os.environ or not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        yield
        return
    hydra = HydraConfig.get()
    basic = hydra.sweeper._target_.endswith(".BasicSweeper")  # another sweeper searches: its parameters name no jobs
    path, started = Path(os.environ[PLACE]) / f"{hydra.job.num}.json", time.monotonic()
    record = {
        "job": int(hydra.job.num),
        "directory": (directory := directory_of()) and os.path.relpath(directory),
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
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        if not basic or not isinstance(error, Exception):
            raise
    finally:
        write_text(path, json.dumps({**record, "seconds": time.monotonic() - started}, indent=2) + "\n")


def summary(place: Path, words: Sequence[str] = ()) -> str:
    """Returns one line for all jobs, then the options, error and directory of each job that did not finish. ``words`` of the
    command say how many jobs it asked for, begun or not."""
    records = _records(place)
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
        lines += [f"    {record['directory']}"] if record["directory"] else []
    if others or total > len(records):
        lines.append("the same command skips what is finished and goes on with the rest")
    return "\n".join(lines)


def _records(place: Path) -> list[dict]:
    found = (json.loads(path.read_text()) for path in place.glob("*.json") if path.stem.isdecimal())
    return sorted(found, key=lambda record: record["job"])


def cause_of(error: BaseException) -> str:
    """Returns one sentence without the words that Hydra and OmegaConf put around it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        return no_option(f"{group}=", option, error.options)
    if isinstance(error, OSError) and not isinstance(error, HydraException):  # a missing option is both
        return fault_of(error)
    key_error = error.__cause__ if isinstance(error, HydraException) else None
    if isinstance(key_error, AttributeError | KeyError) and getattr(key_error, "parent_node", None) is not None:
        return no_option(key_error.full_key[: -len(str(key_error.key))], str(key_error.key), key_error.parent_node)
    if isinstance(error, InstantiationException | OmegaConfBaseException):
        return str(error).splitlines()[0].split("while resolving interpolation: ")[-1]
    text = str(error or key_error)
    lines = map(str.strip, text.splitlines()) if isinstance(error, HydraException) else [text]
    return "; ".join(filter(None, lines)).removeprefix("error: ")
