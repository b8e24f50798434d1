"""What every reducer is: settings that are checked when they are read, and a module built once the target is known.

A reducer turns the N streams of a conditioning source into one vector a token: [B, T, N, D] -> [B, T, D'].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.settings import positive_int

if TYPE_CHECKING:
    from hyperdflash.targets.heads import TargetHeads


class Reducer(nn.Module):
    def forward(self, streams: Tensor) -> Tensor:
        """[B, T, N, D] in the cache's dtype -> [B, T, D'] in that of the products, or at least fp32."""
        raise NotImplementedError

    def reset_parameters(self, heads: TargetHeads, generator: torch.Generator) -> None:
        """Called after the drafter's general rule (matrices normal, norms 1); nothing more to do by default."""


class ReducerConfig(Protocol):
    """``num_streams`` null takes the conditioning's number; a number is checked against it."""

    num_streams: int | None

    def build(self, conditioning: Conditioning, heads: TargetHeads, hidden_size: int) -> Reducer: ...


def checked_num_streams(configured: int | None, conditioning: Conditioning, heads: TargetHeads) -> int:
    num_streams = conditioning.num_streams(heads)
    if configured is not None and positive_int("reducer.num_streams", configured) != num_streams:
        raise ValueError(
            f"reducer.num_streams must be {num_streams} (the streams of conditioning={conditioning.name}) or null, "
            f"got {configured}"
        )
    return num_streams
