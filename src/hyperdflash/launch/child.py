"""Processes that a training starts: what the starter leaves for them, and how they take it up and end with it.

A child is ``python -m MODULE RUN``. It reads the configuration that `save_job` left in RUN/ranks, and ends when the process
that started it does, however that ended: a pipe that nobody writes to comes to its end.
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

END_S = 2.0  # what a child has to notice that it shall end


def save_job(config: DictConfig, run: Path) -> Path:
    """Returns the folder, which is emptied before."""
    folder = run / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    if HydraConfig.initialized():
        OmegaConf.save(OmegaConf.create({"hydra": HydraConfig.get()}), folder / "hydra.yaml")
    return folder


def take_job(run: Path) -> DictConfig:
    """In the child, before anything else."""
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    quiet_libraries()
    if (run / "ranks" / "hydra.yaml").exists():
        HydraConfig.instance().cfg = OmegaConf.load(run / "ranks" / "hydra.yaml")
    return OmegaConf.load(run / "ranks" / "config.yaml")


def start_child(module: str, run: Path, log: Path | None, environment: Mapping[str, str]) -> subprocess.Popen:
    """``log`` None: it writes to this terminal. In a session of its own: a terminal's Ctrl-C comes once, from this process."""
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
    """At once, with the processes that it started itself."""
    process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def how_it_ended(code: int) -> str:
    """An exit code that was not wanted, in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_with_the_starter() -> None:
    os.read(sys.stdin.fileno(), 1)
    if os.getsid(0) == os.getpid():  # as `start_child` started it: what it started itself, such as corpus workers, goes too
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)  # started by hand: the group is that of a shell or script
