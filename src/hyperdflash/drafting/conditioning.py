"""Conditioning sources, the target states that a drafter sees: TargetStates -> streams [B, T, N, D]. A source names the layer
taps that the cache must hold (``layer_ids``), states its number of streams of width D (``num_streams``) and selects them
(``gather``). A reducer then turns the N streams into one vector per token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdflash.contracts import TargetStates
from hyperdflash.settings import natural_int, one_of
from hyperdflash.targets.heads import TargetHeads


class Conditioning:
    """``name`` as on the command line; ``layer_ids``, the taps that the cache must hold; ``reads_next_token``: the streams of
    position i include x[i + 1] (``states.next_ids``), so that in the loop the newest state waits for the anchor's token."""

    name: str
    layer_ids: Sequence[int] = ()
    reads_next_token = False

    def num_streams(self, heads: TargetHeads) -> int:
        """Returns N."""
        raise NotImplementedError

    def gather(self, states: TargetStates, heads: TargetHeads) -> Tensor:
        """Selects the streams of every position: [B, T, N, D]."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PreHcHead(Conditioning):
    """All paths of the residual before the hyper-connection head (paper, section 2.1)."""

    name = "pre_hc_head"

    def num_streams(self, heads: TargetHeads) -> int:
        return heads.num_paths

    def gather(self, states: TargetStates, heads: TargetHeads) -> Tensor:
        return states.residual  # [B, T, M, D]


@dataclass(frozen=True, kw_only=True)
class PostHcHead(Conditioning):
    """The normed state that the LM head reads, computed from the cached residual."""

    name = "post_hc_head"

    def num_streams(self, heads: TargetHeads) -> int:
        return 1

    @torch.no_grad()
    def gather(self, states: TargetStates, heads: TargetHeads) -> Tensor:
        return heads.collapse(states.residual)[:, :, None]  # [B, T, 1, D]


@dataclass(frozen=True, kw_only=True)
class Layers(Conditioning):
    """Outputs of chosen target layers (vanilla DFlash). ``paths`` mean averages the paths, flat makes each one a stream."""

    layer_ids: Sequence[int]
    paths: str = "mean"

    name = "layers"

    def __post_init__(self):
        if isinstance(self.layer_ids, str) or not isinstance(self.layer_ids, Sequence) or not self.layer_ids:
            raise ValueError(f"conditioning.layer_ids must be a list of layer numbers such as [1, 5], got {self.layer_ids!r}")
        ids = tuple(natural_int("every entry of conditioning.layer_ids", i) for i in self.layer_ids)
        if len(set(ids)) < len(ids):
            raise ValueError(f"conditioning.layer_ids must name each layer once, got {list(ids)}")
        one_of("conditioning.paths", self.paths, ("mean", "flat"))
        object.__setattr__(self, "layer_ids", ids)

    def num_streams(self, heads: TargetHeads) -> int:
        return len(self.layer_ids) * (heads.num_paths if self.paths == "flat" else 1)

    def gather(self, states: TargetStates, heads: TargetHeads) -> Tensor:
        missing = [i for i in self.layer_ids if i not in states.layer_ids]
        if missing or states.layers is None:
            raise ValueError(
                f"conditioning={self.name} reads target layers {list(self.layer_ids)}, these states hold "
                f"{list(states.layer_ids)}: capture them again with this conditioning"
            )
        rows = [states.layer_ids.index(i) for i in self.layer_ids]
        taps = states.layers[:, :, rows]  # [B, T, L, M, D]
        return taps.mean(dim=3) if self.paths == "mean" else taps.flatten(2, 3)


@dataclass(frozen=True, kw_only=True)
class ResidualAndLayers(Layers):
    """The paths of the residual, then those of every tapped layer: (1 + L) M streams, for ``reducer=hc_gates``."""

    paths: str = "flat"

    name = "residual_and_layers"

    def __post_init__(self):
        super().__post_init__()
        one_of("conditioning.paths", self.paths, ("flat",))

    def num_streams(self, heads: TargetHeads) -> int:
        return heads.num_paths + super().num_streams(heads)

    def gather(self, states: TargetStates, heads: TargetHeads) -> Tensor:
        return torch.cat([states.residual, super().gather(states, heads)], dim=2)
