"""``hc_gates``: one gate of the paper's form (``hc_gate``) per source, the residual and each tapped layer.

    y_t = sum_s c_s * gate_s(H_s)        c_s [D] trainable; 1 for the residual and 0 for the layers at the start

A new reducer is therefore the paper's on the residual alone. Every gate starts from the target's own.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.drafting.reducers.hc_gate import HcGate, HcGateReducer
from hyperdflash.drafting.reducers.reducer import Reducer
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class HcGates(HcGate):
    """Options as in ``hc_gate``, for every gate."""

    name: ClassVar[str] = "hc_gates"
    conditioning: ClassVar[str] = "residual_and_layers"

    def build(self, conditioning: Conditioning, heads: TargetHeads, hidden_size: int) -> Reducer:
        self.check(conditioning, heads, hidden_size)
        gates = [self.gate(heads) for _ in range(conditioning.num_streams(heads) // heads.num_paths)]
        return HcGatesReducer(gates, heads)


class HcGatesReducer(Reducer):
    def __init__(self, gates: list[HcGateReducer], heads: TargetHeads):
        super().__init__()
        self.num_paths = heads.num_paths
        self.gates = nn.ModuleList(gates)
        self.hc_scale = nn.Parameter(torch.empty(len(gates), heads.hidden_size))

    @torch.no_grad()
    def reset_parameters(self, heads: TargetHeads, generator: torch.Generator) -> None:
        for gate in self.gates:
            gate.reset_parameters(heads, generator)
        self.hc_scale.zero_()
        self.hc_scale[0] = 1.0

    def forward(self, streams: Tensor) -> Tensor:
        sources = streams.split(self.num_paths, dim=2)  # [B, T, M, D] each
        return sum(scale * gate(source) for scale, gate, source in zip(self.hc_scale, self.gates, sources, strict=True))
