"""``selector``: scores the LM head's best tokens of a slot again, with the token before it (DFlash 2; z-lab/dflash, MIT).

    z_k[c] = (W h_k)[c] + <P[x_{k-1}] * (L h_k), S[c]>    for the ``top_k`` candidates c with the largest (W h_k)[c]

W is the target's frozen LM head, P and S [V, r] are tables, L is [r, D]. Only candidates are drafted.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from hyperdflash.contracts import Slots
from hyperdflash.drafting.heads.head import DraftHead
from hyperdflash.drafting.layers import linear
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.settings import positive_int
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class Selector:
    """``rank`` r; ``top_k`` candidates per slot. DFlash 2 has 256 and 16."""

    rank: int = 256
    top_k: int = 16

    def __post_init__(self):
        positive_int("head.rank", self.rank)
        positive_int("head.top_k", self.top_k)

    def build(self, heads: TargetHeads, num_slots: int) -> DraftHead:
        if self.top_k > heads.config.vocab_size:
            raise ValueError(f"head.top_k must be in 1..{heads.config.vocab_size} (the vocabulary), got {self.top_k}")
        return SelectorHead(self, heads.config.vocab_size, heads.hidden_size)


class SelectorHead(DraftHead):
    """``predecessor_codebook`` P, ``hidden_projection`` L, and ``successor_codebook`` S, which starts at 0: the plain LM head,
    limited to its candidates."""

    views = ("head", "lm_head", "candidates")

    def __init__(self, config: Selector, vocab_size: int, width: int):
        super().__init__()
        self.top_k = config.top_k
        self.predecessor_codebook = nn.Embedding(vocab_size, config.rank)
        self.successor_codebook = nn.Embedding(vocab_size, config.rank)
        self.hidden_projection = linear(width, config.rank)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        self.predecessor_codebook.weight.normal_(0.0, std, generator=generator)
        self.hidden_projection.weight.normal_(0.0, std, generator=generator)
        self.successor_codebook.weight.zero_()

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        predecessor = self.predecessor_codebook(slots.previous)
        context = predecessor * self.hidden_projection(slots.features.to(predecessor.dtype))
        return replace(target_logits(slots.features, heads).plus(context, self.successor_codebook.weight), top_k=self.top_k)
