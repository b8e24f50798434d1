"""A safetensors file of records that checks itself: one tap of one shard of the cache, or the index of a dataset.

    length      8 bytes, of the header
    header      JSON: names, dtypes, shapes and places of the tensors below; which cache, shard and tap the file holds
    offsets     [R + 1] int64: record r has the rows offsets[r] to offsets[r + 1]
    others      small tensors that are not rows (in the index of a dataset)
    checksums   [R + 1] uint64, XXH3: of each record, and last of every byte of the file before that last checksum
    rows        tensors [N, ...]: record after record

R records, N tokens. Together the checksums cover every byte. A file is mapped, not read: a record is a view of the page
cache, and a check passes over its bytes once (XXH3 runs at memory speed). Any safetensors reader opens the file too.
"""

import json
import math
import mmap
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_intdigest

from hyperdflash.files import whole_file

ALIGNMENT = 64  # of the rows, in bytes
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


class MissingShard(ValueError):
    """A tap of a shard is not on disk."""


class DamagedShard(ValueError):
    """A byte of a file differs from what was written."""


def write_shard_file(
    path: Path,
    rows: Mapping[str, Tensor],
    lengths: Sequence[int],
    identity: Mapping[str, str],
    others: Mapping[str, Tensor] | None = None,
) -> int:
    """Writes ``rows``, each [N, ...] with N = sum of ``lengths``, whole or not at all; returns the number of bytes. `ShardFile`
    compares ``identity``; ``others`` are tensors of any shape whose size in bytes is a multiple of 8."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    views = {name: _bytes(tensor) for name, tensor in rows.items()}
    widths = {name: len(view) // int(offsets[-1]) for name, view in views.items()}
    checksums = np.zeros(len(offsets), dtype="<u8")
    for record, (start, end) in enumerate(pairwise(offsets.tolist())):
        digest = xxh3_64()
        for name, view in views.items():
            digest.update(view[start * widths[name] : end * widths[name]])
        checksums[record] = digest.intdigest()
    index = {"offsets": torch.from_numpy(offsets), **(others or {}), "checksums": torch.from_numpy(checksums)}
    parts = [_bytes(tensor) for tensor in index.values()]  # a view: the last checksum is filled in below
    entries, place = {"__metadata__": dict(identity)}, 0
    for name, tensor in {**index, **rows}.items():
        end = place + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head) + sum(map(len, parts))) % ALIGNMENT)  # aligns the rows
    head = len(head).to_bytes(8, "little") + head
    checksums[-1] = xxh3_64_intdigest(b"".join([head, *parts])[:-8])
    with whole_file(path) as file:
        for part in (head, *parts, *views.values()):
            file.write(part)
        return file.tell()


class ShardFile:
    """A mapped file, checked but for its records; ``others`` holds the tensors that are not rows. MissingShard when the file
    does not exist, DamagedShard when a byte outside the records is wrong."""

    def __init__(self, path: Path, identity: Mapping[str, str]):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: changes stay in memory
        except FileNotFoundError:
            raise MissingShard(f"the cache has no {path.name}: run `python -m src.capture` with the same options") from None
        except ValueError:
            raise DamagedShard("the file is empty") from None
        self.size = len(self._map)
        self._view = memoryview(self._map)
        try:
            self._read_index(identity)
        except DamagedShard:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
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
        # the checksum covers everything that is read from here on
        for name, wanted in identity.items():
            if found[name] != wanted:
                raise DamagedShard(f"it says {name}={found[name]} where {name}={wanted} belongs")
        self.offsets = self._tensor(header.pop("offsets"), start).numpy().copy()
        self._checksums = self._tensor(header.pop("checksums"), start).numpy().copy()
        self.others: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[Tensor, int, int]] = {}
        for name, entry in header.items():
            tensor, place = self._tensor(entry, start), start + entry["data_offsets"][0]
            if place < index_end:
                self.others[name] = tensor
            else:
                self._rows[name] = (tensor, place, tensor[0].nbytes)

    def _tensor(self, entry: dict, start: int) -> Tensor:
        shape, place = entry["shape"], start + entry["data_offsets"][0]
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=_TORCH[entry["dtype"]])
        return torch.frombuffer(self._map, dtype=_TORCH[entry["dtype"]], count=count, offset=place).view(shape)

    def record(self, index: int) -> dict[str, Tensor]:
        """Returns the rows of one record as views of the file; DamagedShard when a byte of them is wrong."""
        if self._map.size() != self.size:  # reading behind the end of a truncated mapped file would kill the process
            raise DamagedShard(f"it had {self.size:,} bytes when it was opened and has {self._map.size():,} now")
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        digest = xxh3_64()
        for _, place, width in self._rows.values():
            digest.update(self._view[place + begin * width : place + end * width])
        if digest.intdigest() != int(self._checksums[index]):
            raise DamagedShard("the checksum of the record does not fit")
        return {name: tensor[begin:end] for name, (tensor, _, _) in self._rows.items()}


class OpenFiles:
    """The mapped files that a reader used last: at most ``most_files`` and ``most_bytes`` together, but always one. The disk
    space of a removed file stays taken while the file is mapped, so few large files stay open."""

    def __init__(self, most_files: int = 256, most_bytes: int = 2**30):
        self.most_files, self.most_bytes = most_files, most_bytes
        self._files: OrderedDict[Path, ShardFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, path: Path, identity: Mapping[str, str]) -> ShardFile:
        if path not in self._files:
            self._files[path] = ShardFile(path, identity)
            while len(self._files) > 1 and (
                len(self) > self.most_files or sum(f.size for f in self._files.values()) > self.most_bytes
            ):
                self._files.popitem(last=False)
        self._files.move_to_end(path)
        return self._files[path]

    def drop(self, path: Path) -> None:
        """Forgets a file; records that were read from it stay readable."""
        self._files.pop(path, None)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")
