"""``mean``: the average of the streams. It has no parameters and needs a drafter as wide as the target."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.drafting.reducers.reducer import Reducer, checked_num_streams
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class Mean:
    num_streams: int | None = None

    def build(self, conditioning: Conditioning, heads: TargetHeads, hidden_size: int) -> Reducer:
        checked_num_streams(self.num_streams, conditioning, heads)
        if hidden_size != heads.hidden_size:
            raise ValueError(
                f"reducer=mean needs drafter.hidden_size equal to the target's {heads.hidden_size}, "
                f"got {hidden_size}: run with reducer=fc"
            )
        return MeanReducer()


class MeanReducer(Reducer):
    def forward(self, streams: Tensor) -> Tensor:
        return streams.mean(dim=2, dtype=torch.promote_types(streams.dtype, torch.float32))
