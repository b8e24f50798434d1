"""Child processes of a training: how they get its configuration, and how they end with their parent.

A child is ``python -m MODULE RUN``. It reads the configuration that `save_job` wrote to RUN/ranks, and ends when its parent
ends, for whatever reason: its standard input, a pipe from the parent, then closes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hyperdflash.cli import quiet_libraries

END_S = 2.0  # time in which a child ends after its input closes


def save_job(config: DictConfig, run: Path) -> Path:
    """Empties RUN/ranks, writes the configuration there, and returns the folder."""
    folder = run / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    if HydraConfig.initialized():
        OmegaConf.save(OmegaConf.create({"hydra": HydraConfig.get()}), folder / "hydra.yaml")
    return folder


def take_job(run: Path) -> DictConfig:
    """Returns the configuration of the run; a child calls it before anything else."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    if (run / "ranks" / "hydra.yaml").exists():
        HydraConfig.instance().cfg = OmegaConf.load(run / "ranks" / "hydra.yaml")
    return OmegaConf.load(run / "ranks" / "config.yaml")


def start_child(module: str, run: Path, log: Path | None, environment: Mapping[str, str]) -> subprocess.Popen:
    """Starts a child that writes to ``log``, or to this terminal (None). It gets its own session, so that Ctrl-C reaches
    it once, through this process."""
    command = [sys.executable, "-m", module, str(run)]
    output = log.open("wb") if log else None
    try:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
    finally:
        if output is not None:
            output.close()


def end_child(process: subprocess.Popen) -> None:
    """Ends a child at once, together with its own children."""
    process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def how_it_ended(code: int) -> str:
    """Returns in words how a process with this exit code ended."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    if os.getsid(0) == os.getpid():  # started by `start_child`: ends its own children too, such as corpus workers
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)  # started by hand: the group is that of a shell or script
