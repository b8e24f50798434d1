"""Position weights of the draft slots' cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdflash.settings import positive_number


@dataclass(frozen=True, kw_only=True)
class PositionWeighted:
    """``gamma`` of w_k = exp(-(k - 1) / gamma); null weighs every slot alike."""

    gamma: float | None

    def __post_init__(self):
        if self.gamma is not None:
            positive_number("loss.gamma", self.gamma)

    def weights(self, num_slots: int) -> Tensor:
        """[S] fp32."""
        return position_weights(num_slots, self.gamma)


def position_weights(num_slots: int, gamma: float | None) -> Tensor:
    """w_k = exp(-(k - 1) / gamma) for k = 1..S, [S] fp32: an early miss throws away everything after it (DFlash)."""
    if gamma is None:
        return torch.ones(num_slots)
    return torch.exp(-torch.arange(num_slots) / gamma)
