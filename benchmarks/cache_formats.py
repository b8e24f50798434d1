"""Three layouts of target states on disk: this project's cache, plain safetensors, and a peer's file per sample.

A record is token ids [T], a loss mask [T] and states [T, M, D] bfloat16. ``write`` stores a shard's records; ``open`` lists the
files and returns ``read(shard, record) -> (ids, mask, states)``. Readers hold at most 256 open files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.store import Shard, StateStore

Record = tuple[Tensor, Tensor, Tensor]
Read = Callable[[Shard, int], Record]
OPEN_FILES = 256


class Format:
    """A layout; with ``checks`` a read detects a damaged record."""

    name: ClassVar[str]
    checks: ClassVar[bool] = False

    def __init__(self, directory: Path, num_paths: int, hidden_size: int):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, shard: Shard, states: Tensor) -> None:
        raise NotImplementedError

    def open(self, shards: Sequence[Shard]) -> Read:
        raise NotImplementedError

    def records(self, shard: Shard, states: Tensor) -> list[Record]:
        parts = states.split([len(document.input_ids) for document in shard.documents])
        return [(d.input_ids, d.loss_mask, part) for d, part in zip(shard.documents, parts, strict=True)]


class ThisCache(Format):
    name = "this cache"
    checks = True

    def __init__(self, directory: Path, num_paths: int, hidden_size: int):
        super().__init__(directory, num_paths, hidden_size)
        self.key = CacheKey("bench", "bf16", num_paths, hidden_size, "bf16", "none", "none", 0)
        self.store = StateStore(directory, self.key)

    def write(self, shard: Shard, states: Tensor) -> None:
        self.store.write(shard, states)

    def open(self, shards: Sequence[Shard]) -> Read:
        store = StateStore(self.directory, self.key)
        assert not any(store.missing_of(shards, ()).values())

        def read(shard: Shard, index: int) -> Record:
            row = store.read(shard, index)
            return row.input_ids[0], row.loss_mask[0], row.final[0]

        return read


class SafetensorsSlices(Format):
    name = "safetensors, a file per shard"

    def write(self, shard: Shard, states: Tensor) -> None:
        ids, mask, _ = zip(*self.records(shard, states), strict=True)
        offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
        tensors = {"states": states, "input_ids": torch.cat(ids), "loss_mask": torch.cat(mask), "offsets": offsets}
        save_file(tensors, self.directory / f"{shard.name}.safetensors")

    def open(self, shards: Sequence[Shard]) -> Read:
        @lru_cache(OPEN_FILES)
        def file(name: str):
            return safe_open(self.directory / f"{name}.safetensors", framework="pt")

        def read(shard: Shard, index: int) -> Record:
            found = file(shard.name)
            start, end = found.get_slice("offsets")[index : index + 2].tolist()
            return tuple(found.get_slice(name)[start:end] for name in ("input_ids", "loss_mask", "states"))

        return read


class SafetensorsSamples(Format):
    """The layout of speculators 0.9: ``load_file`` of one file per sample."""

    name = "safetensors, a file per sample"

    def write(self, shard: Shard, states: Tensor) -> None:
        for index, (ids, mask, part) in enumerate(self.records(shard, states)):
            tensors = {"input_ids": ids, "loss_mask": mask, "states": part.contiguous()}
            save_file(tensors, self.directory / f"{shard.name}-{index}.safetensors")

    def open(self, shards: Sequence[Shard]) -> Read:
        def read(shard: Shard, index: int) -> Record:
            found = load_file(self.directory / f"{shard.name}-{index}.safetensors")
            return found["input_ids"], found["loss_mask"], found["states"]

        return read


FORMATS: dict[str, type] = {kind.name: kind for kind in (ThisCache, SafetensorsSlices, SafetensorsSamples)}


def write_all(form: Format, shards: Sequence[Shard], states: Callable[[Shard], Tensor]) -> None:
    for shard in shards:
        form.write(shard, states(shard))
