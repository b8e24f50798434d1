"""``fc``: DFlash's generic reducer, one dense projection of all streams side by side. It fits any source and any widths."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.drafting.layers import linear
from hyperdflash.drafting.reducers.reducer import Reducer, checked_num_streams
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class Fc:
    num_streams: int | None = None

    def build(self, conditioning: Conditioning, heads: TargetHeads, hidden_size: int) -> Reducer:
        num_streams = checked_num_streams(self.num_streams, conditioning, heads)
        return FcReducer(num_streams * heads.hidden_size, hidden_size)


class FcReducer(Reducer):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.fc = linear(in_features, out_features)

    def forward(self, streams: Tensor) -> Tensor:
        streams = streams.flatten(2)  # [B, T, N * D]
        if not torch.is_autocast_enabled(streams.device.type):
            streams = streams.to(self.fc.weight.dtype)
        return self.fc(streams)
