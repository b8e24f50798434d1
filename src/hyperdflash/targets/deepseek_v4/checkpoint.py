"""Reads a checkpoint's tensors one at a time: lists names without a shard, and opens only the shards with wanted tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hyperdflash.targets.deepseek_v4.quantization import dequantize


class Checkpoint:
    """``shards`` tensor name -> file name, from model.safetensors.index.json or from the only file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, safe_open] = {}
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            self.shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            self.shards = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def names(self, wanted: Callable[[str], bool]) -> list[str]:
        """Returns the names that ``wanted`` accepts, in the order of their shards."""
        return sorted(filter(wanted, self.shards), key=lambda name: (self.shards[name], name))

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor as stored, on the CPU; ValueError where the checkpoint lacks it or its shard."""
        if name not in self.shards:
            raise ValueError(f"target.path={self.path} lacks {name}: give a complete DeepSeek-V4 checkpoint")
        return self._file(self.shards[name]).get_tensor(name)

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns a copy in ``dtype``, dequantized if the checkpoint has its scale."""
        scale = name.removesuffix("weight") + "scale"
        if name.endswith(".weight") and scale in self.shards:
            return dequantize(self.tensor(name), self.tensor(scale), dtype)
        return self.tensor(name).to(dtype, copy=True)

    def check_complete(self) -> None:
        """Raises ValueError where a shard of the index is absent."""
        shards = sorted(set(self.shards.values()))
        missing = [shard for shard in shards if not (self.path / shard).exists()]
        if missing:
            raise ValueError(
                f"target.path={self.path} lacks {len(missing)} of {len(shards)} shards, first {missing[0]}: "
                "complete the checkpoint"
            )

    def _file(self, shard: str) -> safe_open:
        if shard not in self._files:
            if not (self.path / shard).exists():
                raise ValueError(
                    f"target.path={self.path} has no {shard}: run `python -m src.pretrain` or complete the checkpoint"
                )
            self._files[shard] = safe_open(self.path / shard, framework="pt")
        return self._files[shard]
