"""``hc_gate``: the paper's Inherited HC-Gate Reducer (Eq. 1), one input-dependent scalar gate per path.

    r_t = rsqrt(mean(vec(H_t)^2) + norm_eps)                  the target's inverse-RMS scaling
    alpha_t = sigmoid(W (r_t vec(H_t)) * scale + base) + hc_eps
    y_t = sum_j alpha_{t,j} RMSNorm_j(H_{t,j})                the per-path norm is optional

The gate reads the raw residual. With ``path_norm: false`` this is the target's ``hc_head`` bit for bit in fp32, so the
order of operations follows transformers' hc_head.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.drafting.layers import RMSNorm
from hyperdflash.drafting.reducers.reducer import Reducer, checked_num_streams
from hyperdflash.settings import boolean, one_of
from hyperdflash.targets.heads import TargetHeads

TOKENS = 1024  # tokens per document that are reduced in fp32 at a time


@dataclass(frozen=True, kw_only=True)
class HcGate:
    """``init`` inherit copies the target's ``hc_head``; random draws weights as transformers initializes one."""

    num_streams: int | None = None
    path_norm: bool = True
    init: str = "inherit"

    def __post_init__(self):
        boolean("reducer.path_norm", self.path_norm)
        one_of("reducer.init", self.init, ("inherit", "random"))

    name: ClassVar[str] = "hc_gate"
    conditioning: ClassVar[str] = "pre_hc_head"

    def build(self, conditioning: Conditioning, heads: TargetHeads, hidden_size: int) -> Reducer:
        self.check(conditioning, heads, hidden_size)
        return self.gate(heads)

    def check(self, conditioning: Conditioning, heads: TargetHeads, hidden_size: int) -> None:
        """Raises ValueError if the source or the drafter's width does not fit a gate over the target's paths."""
        if conditioning.name != self.conditioning:
            raise ValueError(
                f"reducer={self.name} is the target's own gate over its residual paths and needs "
                f"conditioning={self.conditioning}, got conditioning={conditioning.name}: run with reducer=fc"
            )
        if hidden_size != heads.hidden_size:
            raise ValueError(
                f"reducer={self.name} needs drafter.hidden_size equal to the target's {heads.hidden_size}, "
                f"got {hidden_size}: run with reducer=fc"
            )
        checked_num_streams(self.num_streams, conditioning, heads)

    def gate(self, heads: TargetHeads) -> "HcGateReducer":
        return HcGateReducer(heads, path_norm=self.path_norm, init=self.init)


class HcGateReducer(Reducer):
    """``hc_fn`` [M, M * D], ``hc_base`` [M], ``hc_scale`` [1] as in the target; ``path_norm.weight`` [M, D]."""

    def __init__(self, heads: TargetHeads, *, path_norm: bool, init: str):
        super().__init__()
        num_paths, width = heads.num_paths, heads.hidden_size
        self.init = init
        self.norm_eps = heads.config.rms_norm_eps
        self.hc_eps = heads.config.hc_eps
        self.hc_fn = nn.Parameter(torch.empty(num_paths, num_paths * width))
        self.hc_base = nn.Parameter(torch.empty(num_paths))
        self.hc_scale = nn.Parameter(torch.empty(1))
        self.path_norm = RMSNorm(num_paths, width, eps=self.norm_eps) if path_norm else None

    @torch.no_grad()
    def reset_parameters(self, heads: TargetHeads, generator: torch.Generator) -> None:
        if self.init == "inherit":
            gate = heads.hc_head.gate()
            if gate is None:
                raise ValueError(
                    "reducer.init=inherit copies the gate with which the target collapses its paths, and this target has "
                    "none: run with reducer.init=random or reducer=fc"
                )
            self.hc_fn.copy_(gate.fn)
            self.hc_base.copy_(gate.base)
            self.hc_scale.copy_(gate.scale)
        else:
            self.hc_fn.normal_(0.0, heads.config.initializer_range, generator=generator)
            self.hc_base.zero_()
            self.hc_scale.fill_(1.0)

    def forward(self, streams: Tensor) -> Tensor:
        """Reduces [B, T, M, D] to [B, T, D] in fp32, a few tokens at a time, and recomputes in the backward pass: all paths in
        fp32, several times over, would take many times the memory of the context."""
        parts = streams.split(TOKENS, dim=1)
        return torch.cat([checkpoint(self.collapse, part, use_reentrant=False, preserve_rng_state=False) for part in parts], 1)

    def collapse(self, streams: Tensor) -> Tensor:
        """Computes Eq. 1: [B, T, M, D] -> [B, T, D]."""
        streams = streams.float()
        paths = streams if self.path_norm is None else self.path_norm(streams)
        return (self.gate(streams)[..., None] * paths).sum(dim=2)

    def gate(self, streams: Tensor) -> Tensor:
        """Returns alpha [B, T, M] in fp32 of [B, T, M, D]: independent sigmoids, not a softmax over paths."""
        with torch.autocast(streams.device.type, enabled=False):
            flat = streams.flatten(2).float()  # [B, T, M * D]
            flat = flat * torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + self.norm_eps)
            mixes = F.linear(flat, self.hc_fn.float())
            return torch.sigmoid(mixes * self.hc_scale.float() + self.hc_base.float()) + self.hc_eps
