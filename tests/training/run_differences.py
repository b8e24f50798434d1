"""Compares two finished runs bit for bit, except for their speed."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch.utils._pytree import keystr, tree_leaves_with_path

from hyperdflash.training.checkpoints import checkpoint_path

_COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


def run_differences(one: Path, other: Path, steps: int) -> list[str]:
    """Returns the names of tensors, states, metrics and files that differ between two run directories of ``steps`` steps."""
    states = [torch.load(checkpoint_path(run / "checkpoints", steps), weights_only=True) for run in (one, other)]
    leaves = [{keystr(at): leaf for at, leaf in tree_leaves_with_path({n: s[n] for n in _COMPARED})} for s in states]
    best = [torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"] for run in (one, other)]
    found = _differing(*leaves) + [f"best.ckpt {name}" for name in _differing(*best)]
    found += ["metrics.csv"] if _metrics(one) != _metrics(other) else []
    texts = [(run / "validation.json").read_text() for run in (one, other)]
    return found + (["validation.json"] if texts[0] != texts[1] else [])


def _differing(one: dict, other: dict) -> list[str]:
    return [name for name in sorted(one.keys() | other.keys()) if not _same(one.get(name), other.get(name))]


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def _metrics(run: Path) -> list[dict]:
    """Returns all rows of metrics.csv without speeds."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.endswith("_per_s")} for row in csv.DictReader(file)]
