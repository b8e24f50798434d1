"""``xpress``: parallel passes refine the drafts of a block (XPress, arXiv 2608.02438).

    a_k = P [H h_k; G mean_j h_j; E[x_{k-1}]],   a_k += sum_{j<=k} L[:, k, j] a_j,   a_k += SwiGLU(a_k),   z_k = W h_k + R a_k

W is the target's frozen LM head, E and R [V, r] are tables, L is [r, S, S]. The tokens x of the first pass are those with the
largest W h_k, of each other pass those with the largest z_k. The last pass's z gives the drafts: their distribution depends on
the context and the anchor alone. With as many passes as slots, greedy drafts are those of a walk from left to right.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hyperdflash.contracts import Slots
from hyperdflash.drafting.heads.head import DraftHead
from hyperdflash.drafting.layers import SwiGLU, linear
from hyperdflash.objectives.factored_logits import LOGITS_BYTES, FactoredLogits, target_logits
from hyperdflash.settings import positive_int
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class XPress:
    """``rank`` r; ``passes`` of drafting, the first ``trained_passes`` of which training reads beside the text's own tokens."""

    rank: int = 256
    passes: int = 6
    trained_passes: int = 3

    def __post_init__(self):
        for name in ("rank", "passes", "trained_passes"):
            positive_int(f"head.{name}", getattr(self, name))

    def build(self, heads: TargetHeads, num_slots: int) -> DraftHead:
        return XPressHead(self, heads.config.vocab_size, heads.hidden_size, num_slots)


class XPressHead(DraftHead):
    """``mixing`` L and ``readout.weight`` R start at 0: the plain LM head."""

    reads_previous, reads_block, views = False, True, ("head", "lm_head", "free")

    def __init__(self, config: XPress, vocab_size: int, width: int, num_slots: int):
        super().__init__()
        self.config, rank = config, config.rank
        self.token_embed, self.readout = nn.Embedding(vocab_size, rank), nn.Embedding(vocab_size, rank)
        self.down_h, self.down_g, self.in_proj = linear(width, rank), linear(width, rank), linear(3 * rank, rank)
        self.mixing = nn.Parameter(torch.empty(rank, num_slots, num_slots))
        self.mlp = SwiGLU(rank, 2 * rank)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        for parameter in self.parameters():
            parameter.normal_(0.0, std, generator=generator)
        self.mixing.zero_()
        self.readout.weight.zero_()

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        """With gradients, ``free`` holds those of the trained passes, which follow the block's own tokens."""
        passes = self._tokens(slots, heads, self.config.trained_passes) if torch.is_grad_enabled() else ()
        free = tuple(self._refined(slots.features, previous, heads) for previous in passes)
        return replace(self._refined(slots.features, slots.previous, heads), free=free)

    def drafted(self, slots: Slots, heads: TargetHeads, of_states: Tensor | None = None) -> FactoredLogits:
        return self._refined(slots.features, self._tokens(slots, heads, self.config.passes, of_states)[-1], heads)

    def _refined(self, features: Tensor, previous: Tensor, heads: TargetHeads) -> FactoredLogits:
        tokens = self.token_embed(previous)  # [..., S, r]
        states = features.to(tokens.dtype)
        of_block = self.down_g(states.mean(dim=-2, keepdim=True)).expand_as(tokens)
        x = self.in_proj(torch.cat([self.down_h(states), of_block, tokens], dim=-1))
        x = x + torch.einsum("rkj,...jr->...kr", self.mixing.tril(), x)
        return target_logits(features, heads).plus(x + self.mlp(x), self.readout.weight)

    @torch.no_grad()
    def _tokens(self, slots: Slots, heads: TargetHeads, num_passes: int, of_states: Tensor | None = None) -> list[Tensor]:
        """Returns the tokens before each slot in passes 1 to n, [B, A, S] each, from a few blocks at a time."""
        size = max(1, LOGITS_BYTES // (4 * len(self.readout.weight) * slots.layout.num_slots))
        found = []
        for features, known in zip(*(x.flatten(0, 1).split(size) for x in (slots.features, slots.previous)), strict=True):
            first = target_logits(features, heads).dense() if of_states is None else of_states[None]  # [n, S, V]
            passes: list[Tensor] = []
            for _ in range(num_passes):
                dense = self._refined(features, passes[-1], heads).dense(first) if passes else first
                passes.append(torch.cat([known[:, :1], dense.argmax(dim=-1)[:, :-1]], dim=1))
            found.append(passes)
        return [torch.cat(parts).view_as(slots.previous) for parts in zip(*found, strict=True)]
