"""Coordinates the ranks of a training before Lightning's trainer starts."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from hyperdflash.launch.launcher import cluster_environment

WAIT = timedelta(days=7)  # rank 0 may have to prepare the dataset and capture its states first
SPARE_S = 600.0  # a collective outlasts a wait for states by this time, so that the rank that waited in vain reports first


class Ranks:
    """``rank`` of ``world_size``; with several, joins the trainer's process group and leaves it at the end of the block.

    ``patience_s`` is how long one rank may wait for states (states/modes.py) while the others are in a collective.
    """

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

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Runs the block in rank 0, then in the others without their output, which rank 0 has printed."""
        if self.rank == 0:
            yield
        if self.world_size > 1:
            dist.barrier(group=self._waiting)
        if self.rank != 0:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
