"""Ways to lay target states on disk, this project's cache among them, with the same records through all.

A record is token ids [T], a loss mask [T] and states [T, M, D] bfloat16. ``write`` stores a shard's records, ``open`` finds
what is there and returns ``read(shard, record) -> (ids, mask, states)``. Each format is used as its own documentation says,
with files mapped and uncompressed where it can; readers keep at most 256 files open.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperdflash.states.store import CacheKey, Shard, StateStore

Record = tuple[Tensor, Tensor, Tensor]
Read = Callable[[Shard, int], Record]
OPEN_FILES = 256


class Format(Protocol):
    """``checks``: a damaged record is found when it is read."""

    name: str
    checks: bool

    def __init__(self, directory: Path, num_paths: int, hidden_size: int): ...

    def write(self, shard: Shard, states: Tensor) -> None: ...

    def open(self, shards: Sequence[Shard]) -> Read: ...


class OfDirectory:
    checks: ClassVar[bool] = False

    def __init__(self, directory: Path, num_paths: int, hidden_size: int):
        self.directory, self.shape = directory, (num_paths, hidden_size)
        directory.mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return self.name

    def records(self, shard: Shard, states: Tensor) -> list[Record]:
        parts = states.split([len(document.input_ids) for document in shard.documents])
        return [(d.input_ids, d.loss_mask, part) for d, part in zip(shard.documents, parts, strict=True)]


class ThisCache(OfDirectory):
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


class SafetensorsSlices(OfDirectory):
    name = "safetensors, a file a shard"

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


class SafetensorsSamples(OfDirectory):
    """As speculators 0.9 reads hidden states: ``load_file`` of one file a sample."""

    name = "safetensors, a file a sample"

    def write(self, shard: Shard, states: Tensor) -> None:
        for index, (ids, mask, part) in enumerate(self.records(shard, states)):
            tensors = {"input_ids": ids, "loss_mask": mask, "states": part.contiguous()}
            save_file(tensors, self.directory / f"{shard.name}-{index}.safetensors")

    def open(self, shards: Sequence[Shard]) -> Read:
        def read(shard: Shard, index: int) -> Record:
            found = load_file(self.directory / f"{shard.name}-{index}.safetensors")
            return found["input_ids"], found["loss_mask"], found["states"]

        return read


class TorchSamples(OfDirectory):
    """As speculators had it before: ``torch.save`` of one dict a sample. A zip of a pickle and of each tensor's bytes."""

    name = "torch.save, a file a sample"

    def write(self, shard: Shard, states: Tensor) -> None:
        for index, (ids, mask, part) in enumerate(self.records(shard, states)):
            sample = {"input_ids": ids, "loss_mask": mask, "states": part.clone()}  # a view would save the whole shard
            torch.save(sample, self.directory / f"{shard.name}-{index}.pt")

    def open(self, shards: Sequence[Shard]) -> Read:
        def read(shard: Shard, index: int) -> Record:
            found = torch.load(self.directory / f"{shard.name}-{index}.pt", weights_only=True)
            return found["input_ids"], found["loss_mask"], found["states"]

        return read


class OfArrow(OfDirectory):
    schema = pa.schema([("input_ids", pa.binary()), ("loss_mask", pa.binary()), ("states", pa.large_binary())])

    def table(self, shard: Shard, states: Tensor) -> pa.RecordBatch:
        columns = zip(*self.records(shard, states), strict=True)
        arrays = [
            pa.array([tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in column], type=field.type)
            for column, field in zip(columns, self.schema, strict=True)
        ]
        return pa.record_batch(arrays, schema=self.schema)

    def record(self, batch: pa.RecordBatch | pa.Table, index: int) -> Record:
        ids, mask, states = (batch.column(i)[index].as_buffer() for i in range(3))
        states = torch.frombuffer(states, dtype=torch.bfloat16).view(-1, *self.shape)
        return torch.frombuffer(ids, dtype=torch.int64), torch.frombuffer(mask, dtype=torch.bool), states


class ArrowFile(OfArrow):
    name = "Arrow IPC, a file a shard"

    def write(self, shard: Shard, states: Tensor) -> None:
        with pa.OSFile(str(self.directory / f"{shard.name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, self.schema) as file:
            file.write_batch(self.table(shard, states))

    def open(self, shards: Sequence[Shard]) -> Read:
        @lru_cache(OPEN_FILES)
        def batch(name: str) -> pa.RecordBatch:
            return pa.ipc.open_file(pa.memory_map(str(self.directory / f"{name}.arrow"))).get_batch(0)

        return lambda shard, index: self.record(batch(shard.name), index)


class ParquetFile(OfArrow):
    """A row group a record, no compression: the best case for reading one record."""

    name = "Parquet, a file a shard"

    def write(self, shard: Shard, states: Tensor) -> None:
        table = pa.Table.from_batches([self.table(shard, states)])
        how = {"row_group_size": 1, "compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(table, self.directory / f"{shard.name}.parquet", **how)

    def open(self, shards: Sequence[Shard]) -> Read:
        @lru_cache(OPEN_FILES)
        def file(name: str) -> pq.ParquetFile:
            return pq.ParquetFile(self.directory / f"{name}.parquet", memory_map=True)

        return lambda shard, index: self.record(file(shard.name).read_row_group(index), 0)


class RawFile(OfDirectory):
    """Bytes of a shard's ids, masks and states in one file, lengths in one JSON index of the whole store."""

    name = "raw bytes and a JSON index"

    def write(self, shard: Shard, states: Tensor) -> None:
        with open(self.directory / f"{shard.name}.bin", "wb") as file:
            for column in zip(*self.records(shard, states), strict=True):
                for tensor in column:
                    file.write(tensor.contiguous().view(torch.uint8).numpy())

    def finish(self, shards: Sequence[Shard]) -> None:
        index = {shard.name: [len(document.input_ids) for document in shard.documents] for shard in shards}
        (self.directory / "index.json").write_text(json.dumps(index))

    def open(self, shards: Sequence[Shard]) -> Read:
        offsets = {
            name: np.concatenate([[0], np.cumsum(lengths)]).tolist()
            for name, lengths in json.loads((self.directory / "index.json").read_text()).items()
        }

        @lru_cache(OPEN_FILES)
        def columns(name: str) -> Record:
            with open(self.directory / f"{name}.bin", "rb") as file:
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            tokens = offsets[name][-1]
            ids = torch.frombuffer(found, dtype=torch.int64, count=tokens)
            mask = torch.frombuffer(found, dtype=torch.bool, count=tokens, offset=8 * tokens)
            return ids, mask, torch.frombuffer(found, dtype=torch.bfloat16, offset=9 * tokens).view(-1, *self.shape)

        def read(shard: Shard, index: int) -> Record:
            start, end = offsets[shard.name][index : index + 2]
            return tuple(column[start:end] for column in columns(shard.name))

        return read


FORMATS: dict[str, type] = {
    kind.name: kind
    for kind in (ThisCache, SafetensorsSlices, SafetensorsSamples, TorchSamples, ArrowFile, ParquetFile, RawFile)
}


def write_all(form: Format, shards: Sequence[Shard], states: Callable[[Shard], Tensor]) -> None:
    for shard in shards:
        form.write(shard, states(shard))
    if isinstance(form, RawFile):
        form.finish(shards)
