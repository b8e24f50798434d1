"""Child processes of a training: ranks and captures. A child reads the configuration that `save_job` wrote to RUN/ranks, and
ends when its parent ends, for whatever reason: its standard input, a pipe from the parent, then closes.

    python -m hyperdflash.launch.child RUN      one rank: trains; writes RUN/ranks/<rank>.json if it fails
    python -m hyperdflash.launch.captures RUN   one capture process
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hyperdflash.cli import quiet_libraries, sentence_of
from hyperdflash.record import write_json

RANK = "hyperdflash.launch.child"
END_S = 2.0  # time in which a child ends after its input closes


def save_job(config: DictConfig, run: Path) -> Path:
    """Removes what earlier ranks wrote to RUN/ranks, writes the configuration there, and returns the folder."""
    folder = run / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if re.fullmatch(r"\d+\.(json|log)|hydra\.yaml", old.name):
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
    """Starts a child that writes to ``log`` (None: this terminal), in its own session, so that Ctrl-C reaches it once."""
    with log.open("wb") if log else nullcontext() as output:
        streams = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
        command = [sys.executable, "-m", module, str(run)]
        return subprocess.Popen(command, env=environment, start_new_session=True, **streams)


def end_child(process: subprocess.Popen) -> None:
    """Ends a child at once, together with its own children."""
    process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    if os.getsid(0) == os.getpid():  # started by `start_child`: ends its own children too, such as corpus workers
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)  # started by hand: the group is that of a shell or script


def main(run: Path) -> None:
    ranks, rank = run / "ranks", os.environ["RANK"]
    config = take_job(run)
    try:
        from hyperdflash.training.job import train

        train(config)
    except Exception as error:
        shown = rank != "0" or os.environ.get("HYDRA_FULL_ERROR") == "1"
        traceback.print_exc(file=None if shown else (ranks / "0.log").open("w"))
        sentence = ((sentence_of(error) or str(error)).splitlines() or [type(error).__name__])[0]
        write_json(ranks / f"{rank}.json", {"time_s": time.time(), "error": sentence})
        sys.stdout.flush()
        os._exit(1)  # a thread that waits for other ranks must not keep this process alive


if __name__ == "__main__":
    main(Path(sys.argv[1]))
