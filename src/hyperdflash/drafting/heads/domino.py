"""``domino``: a GRU over the block's tokens so far gives a low-rank bias of the logits (Domino, arXiv 2605.29707).

    s_k = GRU(s_{k-1}, embed(x_{k-1})),  s_0 = 0,    z_k = W h_k + L2 silu(L1 [h_k; s_k]),    L1 [e, D + G],  L2 [V, e]

W is the target's frozen LM head, embed its embedding. One product with W serves all slots; only the bias is sequential.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hyperdflash.contracts import Slots
from hyperdflash.drafting.heads.head import DraftHead, along_block
from hyperdflash.drafting.layers import linear
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.settings import positive_int
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class Domino:
    """``state`` G, the width of the GRU; ``rank`` e of the bias."""

    state: int = 256
    rank: int = 256

    def __post_init__(self):
        positive_int("head.state", self.state)
        positive_int("head.rank", self.rank)

    def build(self, heads: TargetHeads, num_slots: int) -> DraftHead:
        return DominoHead(self, heads.config.vocab_size, heads.hidden_size)


class DominoHead(DraftHead):
    """``gru`` without biases, ``joint_proj`` L1 and ``token_table.weight`` L2, which starts at 0: the plain LM head."""

    views = ("head", "lm_head")

    def __init__(self, config: Domino, vocab_size: int, width: int):
        super().__init__()
        self.gru = nn.GRUCell(width, config.state, bias=False)
        self.joint_proj = linear(width + config.state, config.rank)
        self.token_table = nn.Embedding(vocab_size, config.rank)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        for parameter in (*self.gru.parameters(), self.joint_proj.weight):
            parameter.normal_(0.0, std, generator=generator)
        self.token_table.weight.zero_()

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        weight = self.joint_proj.weight
        features, tokens = slots.features.to(weight.dtype), heads.embed(slots.previous).to(weight.dtype)
        start = tokens.new_zeros(tokens.shape[:2].numel(), self.gru.hidden_size)
        states = along_block(lambda s, x: (self.gru(x, s),) * 2, start, tokens.flatten(0, 1), slots.layout.parents)
        bias = F.silu(self.joint_proj(torch.cat([features, states.view(*tokens.shape[:3], -1)], dim=-1)))
        return target_logits(slots.features, heads).plus(bias, self.token_table.weight)
