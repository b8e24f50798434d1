"""``correction``: each slot's state is corrected by the token before it, in the hidden space.

    z_k = W (h_k + U silu(V h_k + E embed(x_{k-1}))),    V, E [w D, D],  U [D, w D]

W is the target's frozen LM head and embed its embedding. The correction has the LM head's full rank, and drafting reads the LM
head once per slot; head=markov reads it once per block and is limited to its rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hyperdflash.contracts import Slots
from hyperdflash.drafting.heads.head import DraftHead
from hyperdflash.drafting.layers import linear
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.settings import positive_int
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class Correction:
    """``expansion`` w: the inner width as a multiple of the target's."""

    expansion: int = 2

    def __post_init__(self):
        positive_int("head.expansion", self.expansion)

    def build(self, heads: TargetHeads, num_slots: int) -> DraftHead:
        return CorrectionHead(heads.hidden_size, self.expansion * heads.hidden_size)


class CorrectionHead(DraftHead):
    """``down_proj`` U starts at 0, which makes this the plain LM head."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.state_proj, self.token_proj = linear(width, inner), linear(width, inner)
        self.down_proj = linear(inner, width)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        self.state_proj.weight.normal_(0.0, std, generator=generator)
        self.token_proj.weight.normal_(0.0, std, generator=generator)
        self.down_proj.weight.zero_()

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        weight = self.state_proj.weight
        features, tokens = slots.features.to(weight.dtype), heads.embed(slots.previous).to(weight.dtype)
        inner = F.silu(self.state_proj(features) + self.token_proj(tokens))
        return target_logits(features + self.down_proj(inner), heads)
