"""One file of the cache: one tap of one shard, a safetensors file that checks itself.

    length      8 bytes, of the header
    header      JSON: names, dtypes, shapes and places of what follows; which cache, shard and tap this is
    offsets     [R + 1] int64: record r has the rows offsets[r] to offsets[r + 1]
    checksums   [R + 1] uint64, XXH3: of each record, and last of every byte of the file before that last checksum
    rows        the tap's tensors, each [N, ...]: record after record

R records, N tokens. Together the checksums cover every byte. A file is mapped, not read: a record is a view of the page
cache, and checking it is the one pass over its bytes (XXH3 runs at memory speed). Any safetensors reader opens the file too.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_intdigest

ALIGNMENT = 64  # of the rows, in bytes
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


class MissingShard(ValueError):
    """A tap of a shard is not on disk."""


class DamagedShard(ValueError):
    """A file of the cache is not what was written."""


def write_shard_file(path: Path, rows: Mapping[str, Tensor], lengths: Sequence[int], identity: Mapping[str, str]) -> int:
    """Write ``rows``, each [N, ...] with N = sum of ``lengths``, under ``path`` at once or not at all; returns the bytes.

    ``identity`` is text that ``ShardFile`` wants to find again. Nothing is left behind where writing fails.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    views = {name: _bytes(tensor) for name, tensor in rows.items()}
    sums = [xxh3_64() for _ in lengths]
    for view in views.values():
        width = len(view) // int(offsets[-1])
        for record, start, end in zip(sums, offsets[:-1], offsets[1:], strict=True):
            record.update(view[start * width : end * width])
    checksums = np.array([record.intdigest() for record in sums] + [0], dtype="<u8")
    index = {"offsets": torch.from_numpy(offsets), "checksums": torch.from_numpy(checksums)}
    head = _header({**index, **rows}, identity, before_rows=offsets.nbytes + checksums.nbytes)
    checksums[-1] = xxh3_64_intdigest(head + offsets.tobytes() + checksums[:-1].tobytes())

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            for part in (head, offsets.tobytes(), checksums.tobytes(), *views.values()):
                file.write(part)
            size = file.tell()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return size


class ShardFile:
    """A mapped, checked file; MissingShard where there is none, DamagedShard where a byte outside the records is wrong."""

    def __init__(self, path: Path, identity: Mapping[str, str]):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: nothing is written back
        except FileNotFoundError:
            raise MissingShard(f"the cache has no {path.name}: run `python -m src.capture` with the same options") from None
        except ValueError:
            raise DamagedShard("the file is empty") from None
        self.size = len(self._map)
        self._view = memoryview(self._map)
        try:
            self._read_index(identity)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            if isinstance(error, DamagedShard):
                raise
            raise DamagedShard(f"its header is not readable: {error!r}") from error

    def _read_index(self, identity: Mapping[str, str]) -> None:
        start = 8 + int.from_bytes(self._view[:8], "little")
        if start > self.size:
            raise DamagedShard(f"it has {self.size:,} bytes and its header alone says {start:,}")
        header = json.loads(bytes(self._view[8:start]))
        found = header.pop("__metadata__")
        end = start + max(entry["data_offsets"][1] for entry in header.values())
        if end != self.size:
            raise DamagedShard(f"it has {self.size:,} bytes and its header says {end:,}")
        index_end = start + header["checksums"]["data_offsets"][1]
        if xxh3_64_intdigest(self._view[: index_end - 8]) != int.from_bytes(self._view[index_end - 8 : index_end], "little"):
            raise DamagedShard("the checksum of its header and index does not fit")
        # from here on everything is what was written
        for name, wanted in identity.items():
            if found[name] != wanted:
                raise DamagedShard(f"it says {name}={found[name]} where {name}={wanted} belongs")
        self._offsets = self._array(header.pop("offsets"), start, "<i8")
        self._checksums = self._array(header.pop("checksums"), start, "<u8")
        self._rows = {}
        for name, entry in header.items():
            shape, dtype, place = entry["shape"], _TORCH[entry["dtype"]], start + entry["data_offsets"][0]
            tensor = torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=place).view(shape)
            self._rows[name] = (tensor, place, tensor[0].nbytes)

    def _array(self, entry: dict, start: int, dtype: str) -> list[int]:
        begin, end = entry["data_offsets"]
        return np.frombuffer(self._view[start + begin : start + end], dtype).tolist()

    def record(self, index: int) -> dict[str, Tensor]:
        """The rows of one record, views of the file; DamagedShard where they are not what was written."""
        if self._map.size() != self.size:  # touching what was cut off a mapped file would end the process
            raise DamagedShard(f"it had {self.size:,} bytes when it was opened and has {self._map.size():,} now")
        begin, end = self._offsets[index], self._offsets[index + 1]
        digest = xxh3_64()
        for _, place, width in self._rows.values():
            digest.update(self._view[place + begin * width : place + end * width])
        if digest.intdigest() != self._checksums[index]:
            raise DamagedShard("the checksum of the record does not fit")
        return {name: tensor[begin:end] for name, (tensor, _, _) in self._rows.items()}


class OpenFiles:
    """The files that a reader used last, mapped: at most ``most_files`` of ``most_bytes`` together, one whatever its size.

    A mapped file's space is not free, even when the file has been removed; so few stay where they are large.
    """

    def __init__(self, most_files: int = 256, most_bytes: int = 2**30):
        self.most_files, self.most_bytes = most_files, most_bytes
        self._files: OrderedDict[Path, ShardFile] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._files)

    def get(self, path: Path, identity: Mapping[str, str]) -> ShardFile:
        file = self._files.get(path)
        if file is not None:
            self._files.move_to_end(path)
            return file
        file = self._files[path] = ShardFile(path, identity)
        self._bytes += file.size
        while len(self._files) > 1 and (len(self._files) > self.most_files or self._bytes > self.most_bytes):
            self.drop(next(iter(self._files)))
        return file

    def drop(self, path: Path) -> None:
        """Forget a file; records that were read from it stay readable."""
        file = self._files.pop(path, None)
        if file is not None:
            self._bytes -= file.size


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def _header(tensors: Mapping[str, Tensor], identity: Mapping[str, str], before_rows: int) -> bytes:
    """Length and JSON, padded with spaces until the rows are aligned."""
    entries, place = {"__metadata__": dict(identity)}, 0
    for name, tensor in tensors.items():
        end = place + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + before_rows) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
