"""The interface of every reducer: settings that check themselves, and a module built once the target is known. A reducer turns
the N streams of a conditioning source into one vector per token: [B, T, N, D] -> [B, T, D']."""

from typing import Protocol

import torch
from torch import Tensor, nn

from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.settings import positive_int
from hyperdflash.targets.heads import TargetHeads


class Reducer(nn.Module):
    def forward(self, streams: Tensor) -> Tensor:
        """Reduces streams [B, T, N, D] in the cache's dtype to [B, T, D'] in the dtype of the products, or at least fp32."""
        raise NotImplementedError

    def reset_parameters(self, heads: TargetHeads, generator: torch.Generator) -> None:
        """Draws initial weights after the drafter's general rule (matrices normal, norms 1). Does nothing by default."""


class ReducerConfig(Protocol):
    """``num_streams``: null takes the conditioning's number; any other must equal it."""

    num_streams: int | None

    def build(self, conditioning: Conditioning, heads: TargetHeads, hidden_size: int) -> Reducer: ...


def checked_num_streams(configured: int | None, conditioning: Conditioning, heads: TargetHeads) -> int:
    """Returns the conditioning's number of streams N; ValueError if ``configured`` is another number."""
    num_streams = conditioning.num_streams(heads)
    if configured is not None and positive_int("reducer.num_streams", configured) != num_streams:
        raise ValueError(
            f"reducer.num_streams must be {num_streams} (the streams of conditioning={conditioning.name}) or null, "
            f"got {configured}"
        )
    return num_streams
