"""Target states on disk: one folder per target and codec, shard files named after the documents they hold.

    1. documents, in any order            -> shards: sorted by length, then id; a fixed number of documents each
    2. name of a shard                    = hash of its documents' ids, tokens and loss masks
    3. ab/<name>.residual.safetensors       encoded states [N, M, D], input_ids [N], loss_mask [N]
       ab/<name>.layer3.safetensors         encoded states alone, one file per tapped layer, added when a run first needs it
    4. manifest.json                        what the states depend on; opening refuses another target, codec or encoding

N is the number of tokens of all documents of the shard, one after the other. A file appears under its name only when complete,
and a read checks every byte that it returns (states/shard_file.py). The documents alone decide which batch a document is
captured in, so states never depend on what was cached before.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hyperdflash.contracts import Document, TargetStates
from hyperdflash.files import FULL
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.manifest import NAME as MANIFEST
from hyperdflash.states.manifest import CacheKey, check_manifest, write_manifest
from hyperdflash.states.shard_file import DamagedShard, OpenFiles, write_shard_file


class NoSpace(ValueError):
    """The disk is full; no partial file remains."""


@dataclass(frozen=True)
class Shard:
    """Documents that share one forward and one file per tap."""

    name: str
    documents: Sequence[Document]

    @property
    def lengths(self) -> list[int]:
        return [len(document.input_ids) for document in self.documents]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def make_shards(documents: Sequence[Document], documents_per_shard: int) -> list[Shard]:
    """Groups documents of similar length; the result does not depend on the order of ``documents``."""
    ordered = sorted(documents, key=lambda document: (len(document.input_ids), document.id))
    shards = []
    for start in range(0, len(ordered), documents_per_shard):
        group, digest = tuple(ordered[start : start + documents_per_shard]), hashlib.sha256()
        for d in group:
            digest.update(d.id.encode() + d.input_ids.numpy().tobytes() + d.loss_mask.numpy().tobytes())
        shards.append(Shard(digest.hexdigest()[:20], group))
    return shards


class StateStore:
    """Reads and writes shards below ``directory``; ValueError when it belongs to another target, codec or format. Any number of
    processes may use one directory. ``write`` followed by ``read`` rounds as `codecs.rounded` does."""

    def __init__(self, directory: str | Path, key: CacheKey, create: bool = True):
        """``create`` False writes no manifest, so a missing directory stays missing."""
        self.directory, self.key, self._digest = Path(directory), key, key.digest
        self.codec = CODECS[key.dtype]
        self._opened = OpenFiles()
        if (self.directory / MANIFEST).exists():
            check_manifest(self.directory, key)
        elif create:
            write_manifest(self.directory, key)

    def __getstate__(self) -> dict:
        """Pickles without open files: a loader's worker opens its own."""
        return {**self.__dict__, "_opened": OpenFiles()}

    def path(self, shard: Shard, layer_id: int | None = None) -> Path:
        return self.directory / shard.name[:2] / f"{shard.name}.{_tap(layer_id)}.safetensors"

    def missing(self, shard: Shard, layer_ids: Sequence[int]) -> list[int | None]:
        """Returns the taps of ``shard`` that are not on disk; None stands for the residual."""
        return [tap for tap in (None, *layer_ids) if not self.path(shard, tap).exists()]

    def missing_of(self, shards: Sequence[Shard], layer_ids: Sequence[int]) -> dict[str, list[int | None]]:
        """Returns ``missing`` of many shards by name; lists each folder once instead of looking for each file."""
        there: set[str] = set()
        for folder in {shard.name[:2] for shard in shards}:
            with suppress(FileNotFoundError):
                there.update(os.listdir(self.directory / folder))
        taps = [(tap, f".{_tap(tap)}.safetensors") for tap in (None, *layer_ids)]
        return {shard.name: [tap for tap, end in taps if shard.name + end not in there] for shard in shards}

    def write(self, shard: Shard, states: Tensor, layer_id: int | None = None) -> int:
        """Stores one tap, ``states`` [N, M, D], and returns the number of bytes; NoSpace when the disk is full. After a power
        cut the file may be short, and the next read reports it."""
        assert states.shape == (shard.num_tokens, self.key.num_paths, self.key.hidden_size), states.shape
        rows = self.codec.encode(states)
        if layer_id is None:
            rows["input_ids"] = torch.cat([document.input_ids for document in shard.documents])
            rows["loss_mask"] = torch.cat([document.loss_mask for document in shard.documents])
        path = self.path(shard, layer_id)
        try:
            return write_shard_file(path, rows, shard.lengths, self._identity(shard, layer_id))
        except OSError as error:
            if error.errno not in FULL:
                raise
            size = sum(tensor.nbytes for tensor in rows.values())
            raise NoSpace(
                f"no space left for {path} ({size:,} bytes): free some or give another cache.directory, then run the "
                "same command again; finished shards are kept"
            ) from error

    def remove(self, shard: Shard) -> int:
        """Deletes all taps of ``shard`` and returns the number of bytes freed. The residual goes first and every read
        opens it first, so a reader gets all taps or MissingShard."""
        freed = 0
        whole = (path for path, _, is_partial in self.files(shard.name) if not is_partial)
        for path in sorted(whole, key=lambda path: path != self.path(shard)):
            with suppress(FileNotFoundError):  # another process removed it
                size = path.stat().st_size
                path.unlink()
                freed += size
            self._opened.drop(path)
        return freed

    def read(self, shard: Shard, index: int, layer_ids: Sequence[int] = ()) -> TargetStates:
        """Reads one document of a shard, and nothing else of it, as a batch of one row in the cache's dtype. MissingShard when
        a tap is not on disk; DamagedShard when a byte of the record, the header or the index is wrong, with the damaged record
        and its file. The next read opens that file again."""
        document, places = shard.documents[index], (None, *layer_ids)
        files, records = {}, []
        try:
            for tap in places:  # opens all files before it reads a record
                files[tap] = self._opened.get(self.path(shard, tap), self._identity(shard, tap))
            for tap in places:
                records.append(files[tap].record(index))
            tap = None
            if not torch.equal(records[0]["input_ids"], document.input_ids):
                raise DamagedShard("its tokens are not those of the document")
        except DamagedShard as error:
            path = self.path(shard, tap)
            self._opened.drop(path)
            remedy = "remove the file and run again, it is captured anew"
            raise DamagedShard(f"record {index} ({document.id}) of {path} is damaged: {error}; {remedy}") from error
        document = replace(document, loss_mask=records[0]["loss_mask"])
        residual, *layers = map(self.codec.decode, records)
        return states_of(document, residual, layers, layer_ids)

    def _identity(self, shard: Shard, layer_id: int | None) -> dict[str, str]:
        return {"cache": self._digest, "codec": self.key.dtype, "shard": shard.name, "tap": _tap(layer_id)}

    def files(self, shard: str = "??*") -> Iterator[tuple[Path, str, bool]]:
        """Yields path, shard's name and whether it is partial, of each file that a capture wrote for ``shard``, or for any."""
        for path in self.directory.glob(f"{shard[:2]}/{shard}.*"):
            named = rf"({path.parent.name}[0-9a-f]{{18}})\.(?:residual|layer\d+)\.safetensors(\.\d+\.partial)?"
            if found := re.fullmatch(named, path.name):
                yield path, found[1], found[2] is not None


def _tap(layer_id: int | None) -> str:
    return "residual" if layer_id is None else f"layer{layer_id}"


def states_of(document: Document, residual: Tensor, layers: Sequence[Tensor], layer_ids: Sequence[int]) -> TargetStates:
    """Returns one document as a batch of one row; ``residual`` and each of ``layers`` (of ``layer_ids``) are [T, M, D]."""
    return TargetStates(
        ids=(document.id,),
        domains=(document.domain,),
        input_ids=document.input_ids[None],
        loss_mask=document.loss_mask[None],
        lengths=torch.tensor([len(document.input_ids)]),
        residual=residual[None],
        layers=torch.stack(list(layers), dim=1)[None] if layers else None,
        layer_ids=tuple(layer_ids),
    )


def collate(rows: Sequence[TargetStates]) -> TargetStates:
    """Joins rows of batch size 1 to one right-padded batch [B, T, ...]; padding is zero and masked."""
    length = max(row.input_ids.shape[1] for row in rows)

    def pad(tensors: Sequence[Tensor]) -> Tensor:
        first = tensors[0]
        padded = first.new_zeros((len(tensors), length, *first.shape[2:]))
        for index, tensor in enumerate(tensors):
            padded[index, : tensor.shape[1]] = tensor[0]
        return padded

    return TargetStates(
        ids=tuple(row.ids[0] for row in rows),
        domains=tuple(row.domains[0] for row in rows),
        input_ids=pad([row.input_ids for row in rows]),
        loss_mask=pad([row.loss_mask for row in rows]),
        lengths=torch.cat([row.lengths for row in rows]),
        residual=pad([row.residual for row in rows]),
        layers=None if rows[0].layers is None else pad([row.layers for row in rows]),
        layer_ids=rows[0].layer_ids,
    )
