"""Documents and a producer that need no target: states are random numbers drawn from the tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hyperdflash.contracts import Document
from hyperdflash.states.manifest import CacheKey

NUM_PATHS, HIDDEN = 4, 32


def documents(count: int) -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = 9 + i
        ids = torch.randint(8, 320, (length,), generator=generator)
        made.append(Document(f"d{i}", "code", ids, torch.arange(length) >= 4))
    return made


def key(dtype: str = "bf16") -> CacheKey:
    return CacheKey(target="random", target_dtype="fp32", num_paths=NUM_PATHS, hidden_size=HIDDEN, dtype=dtype)


class RandomStates:
    """A Producer; every forward adds a line ``pid lengths`` to ``log`` and takes ``seconds``."""

    fingerprint = "random"
    where = "nowhere"

    def __init__(self, log: Path | None = None, seconds: float = 0.0):
        self.log, self.seconds = log, seconds

    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()} {[len(s) for s in sequences]}\n")
        time.sleep(self.seconds)
        seed = int(sum(s.sum() for s in sequences))
        shape = (sum(map(len, sequences)), NUM_PATHS, HIDDEN)
        return {
            tap: torch.randn(shape, generator=torch.Generator().manual_seed(seed + (tap or 0))) for tap in (None, *layer_ids)
        }


def forwards(log: Path) -> list[tuple[int, str]]:
    """(process, lengths of the documents) of each forward so far."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.partition(" ")[0]), line.partition(" ")[2]) for line in lines]
