"""Reads a checkpoint's tensors one at a time: lists names without a shard, opens only the shards with wanted tensors, and
dequantizes DeepSeek-V4's two low-precision formats.

    FP8   weight float8_e4m3fn [R, C]              scale float8_e8m0fnu [ceil(R / 128), ceil(C / 128)]
    FP4   weight int8 [R, C / 2], two e2m1 per byte  scale float8_e8m0fnu [R, C / 32]; an even column is in the low four bits

A value is weight * scale. A scale is a power of two, so bf16 and fp32 hold weight, scale and product exactly.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from hyperdflash.files import REFETCH, read_json, reading

FP8_BLOCK = 128
FP4_GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0-7; 8-15 are their negatives
FP32_NAMES = ("hc", "norm", "sinks", "position_bias", "e_score_correction_bias")  # as in transformers' own loading


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the type of the tensor ``name`` (transformers' name) in a model of ``dtype``."""
    return torch.float32 if any(word in name for word in FP32_NAMES) else dtype


class Checkpoint:
    """``shards`` tensor name -> file name, from model.safetensors.index.json or from the only file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, safe_open] = {}
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            self.shards: dict[str, str] = read_json(index, REFETCH, "weight_map")["weight_map"]
        else:
            self.shards = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def names(self, prefix: str) -> list[str]:
        """Returns the names that start with ``prefix``, in the order of their shards."""
        return sorted((name for name in self.shards if name.startswith(prefix)), key=lambda name: (self.shards[name], name))

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor as stored, on the CPU; ValueError where the checkpoint lacks it or its shard."""
        if name not in self.shards:
            raise ValueError(f"target.path={self.path} lacks {name}: give a complete DeepSeek-V4 checkpoint")
        return self._file(self.shards[name]).get_tensor(name)

    def weight(self, name: str, dtype: torch.dtype, columns: int | None = None) -> Tensor:
        """Returns a copy in ``dtype``, dequantized if it has a scale; of a matrix ``columns`` columns, 128 n (None: all)."""
        found, scale = self.tensor(name), name.removesuffix("weight") + "scale"
        if not name.endswith(".weight") or scale not in self.shards:
            return found[..., : columns if found.ndim > 1 else None].to(dtype, copy=True)
        scales, packed = self.tensor(scale), found.dtype == torch.int8
        if columns is not None:
            found = found[:, : columns // (2 if packed else 1)]
            scales = scales[:, : columns // (FP4_GROUP if packed else FP8_BLOCK)]
        return dequantize(found, scales, dtype)

    def files(self) -> dict[str, list[int] | None]:
        """Returns size in bytes and modification time (ns) of every shard; None for an absent one."""
        paths = {shard: self.path / shard for shard in sorted(set(self.shards.values()))}
        stats = {shard: path.stat() if path.exists() else None for shard, path in paths.items()}
        return {shard: stat and [stat.st_size, stat.st_mtime_ns] for shard, stat in stats.items()}

    def check_complete(self) -> None:
        """Raises ValueError where a shard of the index is absent, cut or no file of tensors."""
        shards = self.files()
        if missing := [shard for shard, stat in shards.items() if stat is None]:
            count = f"{len(missing)} of {len(shards)} shards"
            raise ValueError(f"target.path={self.path} lacks {count}, first {missing[0]}: complete the checkpoint")
        for shard in shards:
            self._file(shard)

    def _file(self, shard: str) -> safe_open:
        if shard not in self._files:
            if not (self.path / shard).exists():
                raise ValueError(f"target.path={self.path} has no {shard}: run `python -m src.pretrain` or complete it")
            with reading(self.path / shard, REFETCH):
                self._files[shard] = safe_open(self.path / shard, framework="pt")  # compares the size with the header's
        return self._files[shard]


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns one matrix [R, C] in ``dtype``; ValueError where the scale's shape does not match the weight's format."""
    if weight.dtype not in (torch.float8_e4m3fn, torch.int8):
        raise ValueError(f"a quantized weight is float8_e4m3fn or packed int8, got {weight.dtype} with a scale beside it")
    packed = weight.dtype == torch.int8
    rows, columns = weight.shape[0], weight.shape[1] * (2 if packed else 1)
    height, width = (1, FP4_GROUP) if packed else (FP8_BLOCK, FP8_BLOCK)
    wanted = (math.ceil(rows / height), math.ceil(columns / width))
    if tuple(scale.shape) != wanted:
        raise ValueError(f"a {weight.dtype} weight of {rows} x {columns} wants a scale {list(wanted)}, got {list(scale.shape)}")
    if packed:
        codes = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=dtype)
        pairs = torch.stack([codes.repeat(16), codes.repeat_interleave(16)], dim=1)  # [256, 2], the low four bits first
        values = F.embedding(weight.view(torch.uint8).int(), pairs).flatten(1)
    else:
        values = weight.to(dtype)
    by_row = scale.to(dtype).repeat_interleave(height, dim=0)[:rows]  # [R, C / width]
    groups = F.pad(values, (0, -columns % width)).unflatten(1, (-1, width))  # [R, C / width, width]
    return (groups * by_row[..., None]).flatten(1)[:, :columns]
