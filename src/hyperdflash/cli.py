"""Shared by the entry points: a command's configuration, its errors in one sentence, and the command itself for messages."""

from __future__ import annotations

import logging
import os
import re
import shlex
import warnings
from collections.abc import Callable
from functools import wraps

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from hyperdflash.identity import CONF, runs_dir
from hyperdflash.journal import journal_entry, sweep_journal

EXTRAS = {"wandb": "wandb", "wandb_workspaces": "wandb", "matplotlib": "figures", "datasets": "hub"}  # of pyproject.toml
CONSOLE = "HYPERDFLASH_CONSOLE"  # set in the environment of what the console script starts


def entry_point(config_name: str) -> Callable:
    """``hydra.main`` with the absolute configuration path; a user's error becomes one sentence and exit code 1.

    The jobs of a multirun do not stop each other: how each ended is kept in a journal, and told at the end.
    """

    def decorate(function: Callable[[DictConfig], object]) -> Callable:
        function.__module__ = f"hyperdflash.{config_name}"  # Hydra names the job by its last word

        @wraps(function)
        def task(config: DictConfig):
            logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Lightning imports it, and it tells of its font cache
            from lightning.fabric.utilities.exceptions import MisconfigurationException

            quiet_libraries()
            with journal_entry():
                try:
                    return function(config)
                except InstantiationException as error:
                    raise CompactHydraException(as_started(f"error: {_innermost(error)}")) from None
                except ModuleNotFoundError as error:
                    raise CompactHydraException(f"error: {not_installed(error)}") from None
                except (ValueError, OmegaConfBaseException, MisconfigurationException) as error:
                    if os.environ.get("HYDRA_FULL_ERROR"):
                        raise
                    raise CompactHydraException(as_started(f"error: {_sentence(error)}")) from None

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


def not_installed(error: ModuleNotFoundError) -> str:
    """One sentence about a missing library of pyproject.toml's extras; any other error is raised again."""
    if error.name not in EXTRAS:
        raise error
    return f"{error.name} is not installed: run `pip install 'hyperdflash[{EXTRAS[error.name]}]'`"


def command_of(module: str) -> str:
    """The command that started this job, for messages and records; in a sweep, the job's own."""
    return as_started(shlex.join(["python", "-m", module, *given_overrides()]))


def as_started(text: str) -> str:
    """``text`` with its commands as the user types them: `hyperdflash train` where the console script started this process."""
    return re.sub(r"python -m src\.(\w+)", r"hyperdflash \1", text) if CONSOLE in os.environ else text


def config_name() -> str:
    """The configuration of this job: train, evaluate, ..."""
    return HydraConfig.get().job.config_name if HydraConfig.initialized() else "train"


def capture_command() -> str:
    """Fills a read-only cache: this command without training, and with a cache that is written."""
    command = command_of("src.capture" if config_name() == "train" else f"src.{config_name()}")
    return command.replace(" cache=offline", "")


def _sentence(error: Exception) -> str:
    """Without what OmegaConf puts around it: which interpolation it resolved, and where."""
    if not isinstance(error, OmegaConfBaseException):
        return str(error)
    return str(error).splitlines()[0].split("while resolving interpolation: ")[-1]


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, InstantiationException):
        return str(error).splitlines()[0]
    return str(error)
