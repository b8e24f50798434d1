"""What the entry points share: where the configuration lies, how a run's directory is named, how an error is told.

A run's directory is a function of everything that decides its result, so the same command finds its own run again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hyperdflash.drafting.layer_ids import layer_ids_of
from hyperdflash.files import asset, portable, resource
from hyperdflash.journal import journal_entry, sweep_journal

CONF = str(resource("conf"))
FLASH = str(resource("assets") / "deepseek_v4_flash")  # the released config.json alone
EXTRAS = {"wandb": "wandb", "wandb_workspaces": "wandb", "matplotlib": "figures", "datasets": "hub"}  # of pyproject.toml
CONSOLE = "HYPERDFLASH_CONSOLE"  # set in the environment of what the console script starts
# Counts up where the same configuration trains to another result, so that a run of earlier code is not taken for one of this.
RECIPE = 2
# What decides a training run's result. Logging, and where things lie, do not; of the trainer, what makes it fast does not.
DECIDING = [
    "stage",
    "target",
    "corpus",
    "conditioning",
    "blocks",
    "reducer",
    "drafter",
    "kl",
    "loss",
    "optim",
    "trainer",
    "mode",
    "seed",
    "init_from",
    "cache.dtype",
]
NOT_DECIDING = {
    "target": (
        "device_map",
        "tokens_per_forward",
        "engine",
        "servers",
        "states_dir",
        "check",
        "concurrency",
        "timeout_s",
        "attempts",
    ),
    "corpus": ("directory", "benchmarks_path"),
    "drafter": ("gradient_checkpointing", "compile"),
    "trainer": (
        "accelerator",
        "strategy",
        "threads",
        "batch_size",  # optim.batch_size says it
        "log_every_n_steps",
        "checkpoint_every_steps",
        "checkpoint_every_s",
    ),
}


def runs_dir() -> Path:
    """Where everything that is made goes: ``$HYPERDFLASH_RUNS``, or ``runs``."""
    return Path(os.environ.get("HYPERDFLASH_RUNS", "runs"))


def config_folder(target_path: str) -> str:
    """Where a target's config.json lies: with the target, or DeepSeek-V4-Flash's released one while that is not there yet."""
    if (Path(target_path) / "config.json").exists():
        return target_path
    return FLASH if target_path == OmegaConf.load(Path(CONF) / "target" / "deepseek_v4_flash.yaml").path else target_path


def decided_by(config: DictConfig) -> dict:
    """The part of a training configuration that decides the run's result, resolved."""
    values = {"recipe": RECIPE}
    for name in DECIDING:
        value = OmegaConf.select(config, name, throw_on_missing=True)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
            value = {k: v for k, v in value.items() if k not in NOT_DECIDING.get(name, ())}
        if name == "target":
            value["path"] = portable(value["path"])
        values[name] = value
    if class_name(config.drafter) == "mtp":  # it has its own way to take the states in
        values["conditioning"] = values["reducer"] = None
    return values


def run_name(config: DictConfig) -> str:
    """Readable head and a hash over ``decided_by``: stage1-pre_hc_head-hc_gate-kl0.15-s0-1a2b3c4d."""
    digest = hashlib.sha256(json.dumps(_plain(decided_by(config)), sort_keys=True).encode()).hexdigest()[:8]
    parts = [f"stage{config.stage}", class_name(config.drafter)]
    if parts[-1] != "mtp":
        parts[1:] = [class_name(config.conditioning), class_name(config.reducer)]
    return "-".join([*parts, f"kl{_plain(config.kl.alpha)}", f"s{config.seed}", digest])


def _plain(value: object) -> object:
    """1.0 and 1 alike, all the way down: kl.alpha=0 and kl.alpha=0.0 are one run."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def class_name(group: DictConfig) -> str:
    """A short name of an option from its class: hyperdflash.drafting.reducers.hc_gate.HcGate -> hc_gate."""
    module, _, name = group._target_.rpartition(".")
    snake = "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")
    return "mtp" if "mtp" in module else snake


def train_run_dir(config: DictConfig) -> Path:
    return runs_dir() / "train" / run_name(config)


OmegaConf.register_new_resolver("run_name", lambda *, _root_: run_name(_root_), replace=True)
# ${by_stage:8e-4,1e-4}: the first value in stage 1, the second in stage 2
OmegaConf.register_new_resolver("by_stage", lambda *values, _root_: values[_root_.stage == 2], replace=True)
# ${asset:tiny}: the shipped folder, from wherever the command runs
OmegaConf.register_new_resolver("asset", asset, replace=True)
OmegaConf.register_new_resolver("runs_dir", lambda: str(runs_dir()), replace=True)
# ${layer_ids:PATH,2}: of the target in PATH, as many as the drafter has layers
OmegaConf.register_new_resolver("layer_ids", lambda path, taps: layer_ids_of(config_folder(path), taps), replace=True)


def entry_point(config_name: str) -> Callable:
    """``hydra.main`` with the absolute configuration path; a user's error becomes one sentence and exit code 1.

    The jobs of a multirun do not stop each other: how each ended is kept in a journal, and told at the end.
    """

    def decorate(function: Callable[[DictConfig], object]) -> Callable:
        function.__module__ = f"hyperdflash.{config_name}"  # Hydra names the job by its last word

        @wraps(function)
        def task(config: DictConfig):
            from lightning.fabric.utilities.exceptions import MisconfigurationException

            quiet_libraries()
            with journal_entry():
                try:
                    return function(config)
                except InstantiationException as error:
                    raise CompactHydraException(as_started(f"error: {_innermost(error)}")) from None
                except ModuleNotFoundError as error:
                    if error.name not in EXTRAS:
                        raise
                    install = f"run `pip install 'hyperdflash[{EXTRAS[error.name]}]'`"
                    raise CompactHydraException(f"error: {error.name} is not installed: {install}") from None
                except (ValueError, OmegaConfBaseException, MisconfigurationException) as error:
                    if os.environ.get("HYDRA_FULL_ERROR"):
                        raise
                    raise CompactHydraException(as_started(f"error: {error}")) from None

        main = hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(task)

        @wraps(function)
        def command(*arguments):
            if arguments:  # a composed configuration: no command line, no journal
                return main(*arguments)
            with sweep_journal(runs_dir() / "sweeps"):
                return main()

        return command

    return decorate


def quiet_libraries() -> None:
    """What Lightning and transformers say about hardware and progress at every start is not this run's news."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*in eval mode at the start.*",
        ".*num_workers.*",
        ".*sync_dist=True.*",
        ".*dataloader is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_MININTERVAL", "2")


def given_overrides() -> list[str]:
    """What another command must repeat of this job's: where options are looked for, and the options."""
    if not HydraConfig.initialized():
        return []
    given = HydraConfig.get().overrides
    return [*(o for o in given.hydra if o.startswith("hydra.searchpath=")), *given.task]


def command_of(module: str) -> str:
    """The command that started this job, for messages and records; in a sweep, the job's own."""
    return as_started(shlex.join(["python", "-m", module, *given_overrides()]))


def as_started(text: str) -> str:
    """``text`` with its commands as the user types them: `hyperdflash train` where the console script started this process."""
    return re.sub(r"python -m src\.(\w+)", r"hyperdflash \1", text) if CONSOLE in os.environ else text


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, InstantiationException):
        return str(error).splitlines()[0]
    return str(error)
