"""Who makes target states: the one interface between a target, wherever it runs, and everything that stores or trains on them.

    sequences, each [T_i] int64   ->   tap -> states [N, M, D], N = sum of T_i, the sequences laid end to end

A tap is None for the final residual (``pre_hc_head``) or a layer id. Which sequences come together is the caller's choice; the
same list gives the same states bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from src.target.load import Target
from src.target.taps import tap_residual


class Producer(Protocol):
    """``fingerprint`` names the weights (src.target.load.fingerprint); ``where`` names the place in messages."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def where(self) -> str: ...

    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        """Tap -> states [N, M, D] on the CPU, in the dtype the target computes in."""
        ...


@dataclass(frozen=True)
class InProcess:
    """The target in this process."""

    target: Target

    @property
    def fingerprint(self) -> str:
        return self.target.fingerprint

    @property
    def where(self) -> str:
        return str(self.target.path)

    @torch.inference_mode()
    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        """One forward, right-padded to whole attention windows: right padding is exact for V4 (left padding is not)."""
        model = self.target.model
        window = model.config.sliding_window
        lengths = [len(sequence) for sequence in sequences]
        input_ids = torch.zeros(len(lengths), -(-max(lengths) // window) * window, dtype=torch.long)
        for row, sequence in zip(input_ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        with tap_residual(model, layer_ids) as taps:
            model.model(input_ids.to(model.device), use_cache=False)
        states = {None: taps.final, **{i: taps.layers[i] for i in layer_ids}}
        return {
            tap: torch.cat([value[row, :length] for row, length in enumerate(lengths)]).cpu() for tap, value in states.items()
        }
