"""Shared by the entry points: a command's configuration, its errors in one sentence, and the command itself for messages."""

import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from hyperdflash.command_help import command_help
from hyperdflash.identity import CONF, runs_dir, train_run_dir
from hyperdflash.journal import NOT_COMPOSED, cause_of, journal_entry, sweep_journal
from hyperdflash.options import check_keys, check_values

# library -> extra of pyproject.toml
EXTRAS = {"wandb": "wandb", "wandb_workspaces": "wandb", "matplotlib": "figures", "tensorboard": "tensorboard"}
EXTRAS |= {"datasets": "hub"}
TORCHRUN = r"(^|[/\0])torch(run|[./]distributed[./]\w+(\.py)?)(\0|$)"  # in a command line, whose words end with \0
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "JSM_NAMESPACE_RANK")
SLURM = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}  # as for one task, which changes nothing
MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)  # of a user, or faults of the file system
CONSOLE = "HYPERDFLASH_CONSOLE"  # set in the environment of what the console script starts
REPEATED = (  # warnings about hardware and progress that Lightning gives at every start
    ".*LeafSpec.*",
    ".*smaller than the logging interval.*",
    ".*in eval mode at the start.*",
    ".*num_workers.*",
    ".*sync_dist=True.*",
    ".*dataloader is not resumable.*",
)


def entry_point(config_name: str) -> Callable:
    """Returns a decorator like ``hydra.main``; a user's error becomes one sentence and exit code 1. A multirun continues after
    a failed job; a journal records how each job ended, and the command prints it at the end."""

    def decorate(function: Callable[[DictConfig], object]) -> Callable:
        function.__module__ = f"hyperdflash.{config_name}"  # Hydra names the job by its last word

        @wraps(function)
        def task(config: DictConfig):
            ignore_leftovers()
            logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Lightning imports it, and it logs its font cache
            quiet_libraries()
            with journal_entry(partial(_directory_of, config)):
                try:
                    if NOT_COMPOSED in config:
                        raise ValueError(config[NOT_COMPOSED])
                    check_values(config)
                    if HydraConfig.initialized():
                        check_keys(config, HydraConfig.get())
                    return function(config)
                except Exception as error:
                    if (sentence := sentence_of(error)) is None:
                        raise
                    raise CompactHydraException(f"error: {sentence}") from None

        main = hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(task)

        @wraps(function)
        def command(*composed: DictConfig):
            os.environ.setdefault("TQDM_MININTERVAL", "2")  # seconds; read when tqdm is imported
            if composed:  # no command line, no journal
                return main(*composed)
            if {"-h", "--help"} & {*sys.argv[1:]}:
                print(as_started(command_help(config_name, [word for word in sys.argv[1:] if not word.startswith("-")])))
                return 0

            def journaled() -> object:
                with sweep_journal(runs_dir() / "sweeps"):
                    return main()

            if code := exit_code(journaled):
                sys.exit(code)

        return command

    return decorate


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command; returns its exit code, 1 after an error, which is printed in one sentence or with its traceback."""
    try:
        code = command()
    except Exception as error:
        if (sentence := sentence_of(error)) is None:
            traceback.print_exc()
        else:
            print(f"error: {sentence}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def ignore_leftovers() -> None:
    """Removes variables of torchrun or srun, with one line, where no such launcher started this process. torchrun is one of the
    processes above its ranks, and srun names a process of each task. Without /proc, all of them count."""
    above, pid = {}, str(os.getppid())
    with suppress(OSError):
        while pid != "0":
            above[pid] = Path("/proc", pid, "cmdline").read_text(errors="replace")
            pid = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1]
    slurm, left = {name: os.environ[name] for name in SLURM if name in os.environ}, []
    if above and not any(re.search(TORCHRUN, line) for line in above.values()):
        left += [name for name in os.environ if name in RANKS or name.startswith("TORCHELASTIC_")]
    srun = "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_TASK_PID") in (str(os.getpid()), *above)
    if above and not srun and not slurm.items() <= SLURM.items():
        left += slurm
    if left:
        print(f"ignoring {', '.join(left)}: neither torchrun nor srun started this process", flush=True)
    for name in left:
        del os.environ[name]


def quiet_libraries() -> None:
    """Turns off what Lightning and transformers print about hardware and progress at every start."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in REPEATED:
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _directory_of(config: DictConfig) -> str | None:
    """Returns the folder of a job of a multirun; None for a training that has no name."""
    if NOT_COMPOSED in config or not HydraConfig.initialized():
        return None
    if config_name() != "train":
        return HydraConfig.get().runtime.output_dir
    try:
        return str(train_run_dir(config))
    except Exception:  # the job itself says what is wrong
        return None


def given_overrides() -> list[str]:
    """Returns the words that another command repeats to get this job's options, and to find them."""
    if not HydraConfig.initialized():
        return []
    given = HydraConfig.get().overrides
    return [*(o for o in given.hydra if o.startswith("hydra.searchpath=")), *given.task]


def sentence_of(error: Exception) -> str | None:
    """Returns one sentence about a user's mistake, a missing library of pyproject.toml's extras or a fault of the file system;
    None for any other error, which needs its traceback, and with HYDRA_FULL_ERROR=1."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed: run `pip install 'hyperdflash[{EXTRAS[error.name]}]'`"
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return None
    told = isinstance(error, MISTAKES) or type(error).__name__ == "MisconfigurationException"  # Lightning's
    return as_started(cause_of(error)) if told else None


def command_of(module: str) -> str:
    """Returns the command that started this job, for messages and records; in a sweep, the job's own."""
    return as_started(shlex.join(["python", "-m", module, *given_overrides()]))


def as_started(text: str) -> str:
    """Returns ``text`` with commands as the user types them: `hyperdflash train` if the console script started this process."""
    return re.sub(r"python -m src\.(\w+)", r"hyperdflash \1", text) if CONSOLE in os.environ else text


def config_name() -> str:
    """Returns the name of this job's configuration: train, evaluate, ..."""
    return HydraConfig.get().job.config_name if HydraConfig.initialized() else "train"


def capture_command() -> str:
    """Returns the command that captures what a read-only cache lacks."""
    command = command_of("src.capture" if config_name() == "train" else f"src.{config_name()}")
    return command.replace(" cache=offline", "")
