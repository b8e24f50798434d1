"""``markov``: a low-rank bias from the token before each slot (DSpark, arXiv 2607.05147, "vanilla").

    z_k = W h_k + W2 W1[x_{k-1}],    W1, W2 [V, r]

W is the target's frozen LM head. One product with W serves all slots; only the bias is sequential when drafting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperdflash.contracts import Proposal, Slots
from hyperdflash.drafting.heads.head import DraftHead, joined_proposal
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.settings import positive_int
from hyperdflash.targets.sampling import Sampler

if TYPE_CHECKING:
    from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class Markov:
    """``rank`` r; DSpark uses 256."""

    rank: int = 256

    def __post_init__(self):
        positive_int("head.rank", self.rank)

    def build(self, heads: TargetHeads) -> MarkovHead:
        return MarkovHead(heads.config.vocab_size, self.rank)


class MarkovHead(DraftHead):
    """``markov_w1.weight`` and ``markov_w2.weight`` [V, r]. W2 starts at 0, which makes this the plain LM head."""

    def __init__(self, vocab_size: int, rank: int):
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Embedding(vocab_size, rank)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        self.markov_w1.weight.normal_(0.0, std, generator=generator)
        self.markov_w2.weight.zero_()

    def confidence(self, features: Tensor, embedded: Tensor) -> Tensor | None:
        """Returns the logit [...] that a draft is accepted, from states [..., D] and W1[x_{k-1}] [..., r]; None by default."""
        return None

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        embedded = self.markov_w1(slots.previous)  # [B, A, S, r]
        logits = target_logits(slots.features, heads).plus(embedded, self.markov_w2.weight)
        return logits.with_confidence(self.confidence(slots.features, embedded))

    def propose(self, slots: Slots, heads: TargetHeads, anchor_id: Tensor, sampler: Sampler) -> Proposal:
        features = slots.features[0, 0]  # [n, D]
        of_states = target_logits(features, heads).dense()  # [n, V]
        tokens, chosen = [anchor_id], []
        for slot, parent in enumerate(slots.layout.parents[: len(features)]):
            embedded = self.markov_w1(tokens[parent])  # [1, r]
            bias = F.linear(embedded, self.markov_w2.weight).float()
            ids, probs = sampler.choose(of_states[slot : slot + 1] + bias)
            chosen.append((ids, probs, self.confidence(features[slot : slot + 1], embedded)))
            tokens.append(ids)
        return joined_proposal(chosen)
