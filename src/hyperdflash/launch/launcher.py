"""Starts the ranks of one training from the run's own configuration, one child process per device, and its captures.

Lightning's launcher would run the whole command line again in every rank, all jobs of a sweep included. Rank 0 writes to the
terminal, the others to RUN/ranks/<rank>.log. When a rank fails, the others end too, and its error becomes that of the run.
Ranks of torchrun or Slurm are used as they are.
"""

import io
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, ListConfig

from hyperdflash.launch.captures import Captures
from hyperdflash.launch.child import RANK, end_child, how_it_ended, save_job, start_child
from hyperdflash.settings import one_of
from hyperdflash.training.checkpoints import SIGNALS, Stopped, handled_by

GRACE_S = 5.0  # time in which the other ranks end by themselves after a failure
WAIT = timedelta(days=7)  # rank 0 may have to prepare the dataset and capture its states first
SPARE_S = 600.0  # a collective outlasts a wait for states by this time, so that the rank that waited in vain reports first
SAVE_S = 300.0  # time to save and stop after one rank stopped or a capture process failed
POLL_S = 0.1
STOPPED = {code: signum for signum in SIGNALS for code in (128 + signum, -signum)}  # exit codes of ranks that a signal stopped


def cluster_environment() -> LightningEnvironment | SLURMEnvironment | TorchElasticEnvironment:
    """Returns who started this process, which decides where its rank is read from."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        try:
            return SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:
            raise ValueError(error) from None
    return LightningEnvironment()


def is_rank() -> bool:
    """Returns whether this process is one of the ranks that somebody started for one training."""
    environment = cluster_environment()
    return not isinstance(environment, LightningEnvironment) or environment.creates_processes_externally


def num_devices(trainer: DictConfig) -> int:
    """Returns the number of ranks on this machine; ValueError for a wrong ``trainer.devices``."""
    devices = trainer.devices
    if isinstance(devices, ListConfig) and len(devices) and all(type(device) is int for device in devices):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if trainer.accelerator in ("gpu", "cuda", "auto") else 1
    if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
        return devices
    raise ValueError(f"trainer.devices must be a number of devices, a list of their indices or auto, got {devices!r}")


def check_devices(trainer: DictConfig) -> None:
    """Raises ValueError for a wrong ``trainer.accelerator``, or where this machine lacks the devices."""
    one_of("trainer.accelerator", trainer.accelerator, ("cpu", "gpu", "cuda", "auto"))
    wanted, there = num_devices(trainer), torch.cuda.device_count()
    if trainer.accelerator in ("gpu", "cuda") and wanted > there:
        raise ValueError(
            f"trainer.accelerator={trainer.accelerator} with trainer.devices={trainer.devices} wants {wanted} CUDA device(s), "
            f"and torch finds {there} here: run it where they are, or with trainer=cpu"
        )


def num_ranks(trainer: DictConfig) -> int:
    """Returns the world size of a training."""
    return num_devices(trainer) * trainer.num_nodes


def must_launch(trainer: DictConfig, captures: int = 0) -> bool:
    """Returns whether this process must start ranks, or one rank with ``captures`` capture processes; ValueError when somebody
    else had to start the ranks, started another number of them, or started them although there are captures."""
    if not is_rank():
        if trainer.num_nodes > 1:
            raise ValueError(
                f"trainer.num_nodes={trainer.num_nodes} needs one process per device, started on every machine: run the "
                "command with srun (one task per device) or torchrun -m src.train"
            )
        return num_devices(trainer) > 1 or captures > 0
    environment = cluster_environment()
    own = isinstance(environment, LightningEnvironment)  # knows its world size only later
    started, wanted = int(os.environ.get("WORLD_SIZE", 1)) if own else environment.world_size(), num_ranks(trainer)
    if started != wanted:
        raise ValueError(
            f"{started} rank(s) were started (torchrun, srun), but trainer.devices={trainer.devices} on trainer.num_nodes="
            f"{trainer.num_nodes} are {wanted}: start {wanted}, or change trainer.devices (per machine) and trainer.num_nodes"
        )
    if captures and not own:
        raise ValueError(
            f"cache.captures={captures} belongs to a training that starts its own ranks: under torchrun or srun start "
            "`python -m src.capture` beside it, with cache.captures=0 cache.in_process=false"
        )
    return False


class Ranks:
    """Joins the process group of a training for a block; one rank may wait ``patience_s`` for states while the others are in a
    collective."""

    def __init__(self, world_size: int, accelerator: str, patience_s: float = 0.0):
        self.world_size, self.rank = world_size, 0
        if world_size == 1:
            return
        environment = cluster_environment()
        self.rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        backend = "nccl" if accelerator != "cpu" and torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=patience_s + SPARE_S)
        dist.init_process_group(backend, rank=self.rank, world_size=world_size, timeout=timeout)
        self._waiting = dist.new_group(backend="gloo", timeout=WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Runs the block in rank 0, then in the others without their output, which rank 0 has printed."""
        if self.rank == 0:
            yield
        if self.world_size > 1:
            dist.barrier(group=self._waiting)
        if self.rank != 0:
            with redirect_stdout(io.StringIO()):
                yield


def launch_ranks(config: DictConfig, run: Path) -> None:
    """Starts the ranks of ``run`` and waits for them; ValueError with the error of the one that failed first.

    Passes SIGTERM and SIGINT on to the ranks, which save and stop, then raises ``Stopped``. The ranks end with this process.
    """
    count, captures = num_devices(config.trainer), config.cache.get("captures", 0)
    ranks = save_job(config, run)
    processes: list[subprocess.Popen] = []
    signals: list[int] = []

    def stop(signum: int, frame: object = None) -> None:
        signals.append(signum)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    if count > 1:
        print(f"starting {count} ranks; those after the first write to {ranks}", flush=True)
    with handled_by(stop), Captures(run, captures) as beside:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        try:
            for rank in range(count):
                if not signals:
                    processes.append(_start(run, rank, count, port))
            if signals:  # no rank has begun, and one may have missed the signal
                print(f"\n{Stopped(signals[-1])} before the training began", flush=True)
                raise Stopped(signals[-1])
            ended_s, no_states = _wait(processes, signals, beside, stop)
        finally:
            for process in processes:
                end_child(process)
    codes = [process.returncode for process in processes]
    # a rank that alone got a signal shares it, and all save and stop together
    told_to_stop = bool(signals) or all(code in STOPPED for code in codes)
    reasons, failures = [no_states] if no_states and any(codes) else [], []
    for rank, when in ended_s.items():
        if not _is_good(codes[rank], told_to_stop):
            record = {"time_s": when - 2 * POLL_S, "error": None}
            if (path := ranks / f"{rank}.json").exists():
                record = json.loads(path.read_text())
            what = f"failed: {record['error']}" if record["error"] else how_it_ended(codes[rank])
            failures.append((record["time_s"], f"rank {rank} of {count} {what}; more in {ranks}"))
    if failures:
        reasons.append(min(failures)[1])  # the failure of one rank makes the others fail, so the earliest is the cause
    if reasons:
        raise ValueError("; ".join(reasons))
    if stopped := [STOPPED[code] for code in codes if code in STOPPED]:
        raise Stopped(stopped[0])


def _start(run: Path, rank: int, count: int, port: int) -> subprocess.Popen:
    """Starts one rank with the environment that torch.distributed reads."""
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank}
    own |= {"NODE_RANK": 0}
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    environment = outer | {name: str(value) for name, value in own.items()}
    return start_child(RANK, run, run / "ranks" / f"{rank}.log" if rank else None, environment)


def _wait(processes: list[subprocess.Popen], signals: list[int], beside: Captures, stop) -> tuple[dict[int, float], str | None]:
    """Waits until all ranks end: at most ``GRACE_S`` after one failed, or ``SAVE_S`` after one stopped by a signal of its own
    or a capture process failed. Returns rank -> time at which its end was seen, and the failure of the capture process."""
    ended_s: dict[int, float] = {}
    no_states, told_s = None, 0.0
    while len(ended_s) < len(processes):
        now = time.time()
        ended_s |= {rank: now for rank, process in enumerate(processes) if rank not in ended_s and process.poll() is not None}
        codes = {rank: processes[rank].returncode for rank in ended_s}
        limits_s = [  # a rank that a signal killed (code < 0) has saved nothing
            ended_s[rank] + (SAVE_S if code in STOPPED and code > 0 else GRACE_S)
            for rank, code in codes.items()
            if not _is_good(code, bool(signals))
        ]
        if not ended_s and not signals and (no_states := beside.failure()):
            print("a capture process is gone: the training is told to save and stop", flush=True)
            stop(signal.SIGTERM)
            told_s = now
        if now > min([*limits_s, *([told_s + SAVE_S] if no_states else [])], default=now):
            break
        time.sleep(POLL_S)
    return ended_s, no_states


def _is_good(code: int, told_to_stop: bool) -> bool:
    return code == 0 or (told_to_stop and code in STOPPED)
