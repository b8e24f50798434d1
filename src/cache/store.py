"""Target states on disk: one folder a target and dtype, safetensors shards named by the documents they hold.

    1. documents, in any order            -> shards: sorted by length, then id; a fixed number of documents each
    2. a shard's name                     = hash of its documents' ids, tokens and loss masks
    3. <shard>.final.safetensors            input_ids [N], loss_mask [N], offsets [docs + 1], states [N, M, D]
       <shard>.layer3.safetensors           states [N, M, D], one file a tapped layer, added when first asked for
    4. manifest.json                        what the states depend on; another target or dtype is refused by name

N is the number of tokens of all documents of the shard, laid end to end. A file appears under its name only when complete.
Which batch a document is captured in is a function of the documents alone, so states never depend on what was cached before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.contracts import Document, TargetStates

FORMAT_VERSION = 1
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class CacheKey:
    """What cached states depend on, besides the documents themselves."""

    target: str  # fingerprint of the weights
    target_dtype: str  # what the target computes in
    num_paths: int
    hidden_size: int
    dtype: str
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Shard:
    """Documents that are captured in one forward and stored together."""

    name: str
    documents: tuple[Document, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(document.input_ids) for document in self.documents)

    @property
    def sequences(self) -> list[Tensor]:
        """Token ids of each document, [T_i] int64: what a producer is given."""
        return [document.input_ids for document in self.documents]


def make_shards(documents: Sequence[Document], documents_per_shard: int) -> list[Shard]:
    """Group documents of similar length; the result does not depend on the order they come in."""
    if documents_per_shard < 1:
        raise ValueError(f"cache.documents_per_shard must be at least 1, got {documents_per_shard}")
    ordered = sorted(documents, key=lambda document: (len(document.input_ids), document.id))
    shards = []
    for start in range(0, len(ordered), documents_per_shard):
        group = tuple(ordered[start : start + documents_per_shard])
        digest = hashlib.sha256()
        for document in group:
            digest.update(document.id.encode())
            digest.update(document.input_ids.numpy().tobytes())
            digest.update(document.loss_mask.numpy().tobytes())
        shards.append(Shard(digest.hexdigest()[:20], group))
    return shards


class StateStore:
    """Reads and writes shards below ``directory``; ValueError where it belongs to another target, dtype or format."""

    def __init__(self, directory: str | Path, key: CacheKey):
        if key.dtype not in DTYPES:
            raise ValueError(f"cache.dtype must be one of {', '.join(DTYPES)}, got {key.dtype!r}")
        self.directory = Path(directory)
        self.key = key
        self.dtype = DTYPES[key.dtype]
        self._check_manifest()

    def _check_manifest(self) -> None:
        path = self.directory / "manifest.json"
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(self.key), indent=2) + "\n")
            partial.replace(path)
            return
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not readable as JSON ({error}): remove {self.directory} and capture again") from error
        wanted = asdict(self.key)
        differing = [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
        if differing:
            pairs = ", ".join(f"{n}={found.get(n)!r} where this run needs {wanted.get(n)!r}" for n in sorted(differing))
            raise ValueError(f"cache {self.directory} was written with {pairs}: give another cache.directory or remove it")

    def path(self, shard: Shard, layer_id: int | None = None) -> Path:
        """File of a tap: the final residual, or the output of one layer."""
        tap = "final" if layer_id is None else f"layer{layer_id}"
        return self.directory / shard.name[:2] / f"{shard.name}.{tap}.safetensors"

    def missing(self, shard: Shard, layer_ids: Sequence[int]) -> list[int | None]:
        """Taps of ``shard`` that are not on disk; None stands for the final residual."""
        return [tap for tap in (None, *layer_ids) if not self.path(shard, tap).exists()]

    def write(self, shard: Shard, states: Tensor, layer_id: int | None = None) -> int:
        """Store one tap, ``states`` [N, M, D]; returns the bytes written."""
        assert states.shape == (shard.num_tokens, self.key.num_paths, self.key.hidden_size), states.shape
        tensors = {"states": states.to(self.dtype).contiguous()}
        if layer_id is None:
            lengths = torch.tensor([0] + [len(document.input_ids) for document in shard.documents])
            tensors["input_ids"] = torch.cat([document.input_ids for document in shard.documents])
            tensors["loss_mask"] = torch.cat([document.loss_mask for document in shard.documents])
            tensors["offsets"] = lengths.cumsum(0)
        path = self.path(shard, layer_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        size = partial.stat().st_size
        partial.replace(path)
        return size

    def read(self, shard: Shard, index: int, layer_ids: Sequence[int] = ()) -> TargetStates:
        """One document of a shard as a batch of one row, in the cache's dtype; nothing else of the shard is read."""
        path = self.path(shard)
        with _open(path) as file:
            start, end = file.get_slice("offsets")[index : index + 2].tolist()
            input_ids = file.get_slice("input_ids")[start:end]
            loss_mask = file.get_slice("loss_mask")[start:end]
            final = file.get_slice("states")[start:end]
        document = shard.documents[index]
        if not torch.equal(input_ids, document.input_ids):
            raise ValueError(f"{path} holds other tokens for {document.id} than asked for: remove the file and capture again")
        document = replace(document, loss_mask=loss_mask)
        layers = []
        for layer_id in layer_ids:
            with _open(self.path(shard, layer_id)) as file:
                layers.append(file.get_slice("states")[start:end])
        return states_of(document, final, layers, layer_ids)


def states_of(document: Document, final: Tensor, layers: Sequence[Tensor], layer_ids: Sequence[int]) -> TargetStates:
    """One document as a batch of one row: ``final`` [T, M, D] and, for each of ``layer_ids``, [T, M, D]."""
    return TargetStates(
        ids=(document.id,),
        domains=(document.domain,),
        input_ids=document.input_ids[None],
        loss_mask=document.loss_mask[None],
        lengths=torch.tensor([len(document.input_ids)]),
        final=final[None],
        layers=torch.stack(list(layers), dim=1)[None] if layers else None,
        layer_ids=tuple(layer_ids),
    )


def _open(path: Path):
    if not path.exists():
        raise ValueError(f"the cache has no {path.name}: run `python -m src.capture` with the same options")
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own class, without a public name
        raise ValueError(f"{path} is damaged ({error}): remove the file and run again, it is captured anew") from error


def collate(rows: Sequence[TargetStates]) -> TargetStates:
    """Rows of batch size 1 -> one right-padded batch [B, T, ...]; padding is zero and masked."""
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
        final=pad([row.final for row in rows]),
        layers=pad([row.layers for row in rows]) if rows[0].layers is not None else None,
        layer_ids=rows[0].layer_ids,
    )
