"""``markov_confidence``: the Markov head with DSpark's estimate of its own acceptance (arXiv 2607.05147).

c_k = sigmoid(Linear(D + r -> 1)[h_k; W1[x_{k-1}]]),    trained towards sum_v min(p_v, q_v) by objectives/confidence.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hyperdflash.drafting.heads.markov import Markov, MarkovHead

if TYPE_CHECKING:
    from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class MarkovConfidence(Markov):
    def build(self, heads: TargetHeads) -> MarkovConfidenceHead:
        return MarkovConfidenceHead(heads.config.vocab_size, self.rank, heads.hidden_size)


class MarkovConfidenceHead(MarkovHead):
    """``confidence_proj`` [1, D + r] with a bias. Both start at 0, where every confidence is 1/2."""

    has_confidence = True

    def __init__(self, vocab_size: int, rank: int, width: int):
        super().__init__(vocab_size, rank)
        self.confidence_proj = nn.Linear(width + rank, 1)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        super().reset_parameters(generator, std)
        self.confidence_proj.weight.zero_()
        self.confidence_proj.bias.zero_()

    def confidence(self, features: Tensor, embedded: Tensor) -> Tensor:
        joined = torch.cat([features, embedded.to(features.dtype)], dim=-1)
        return self.confidence_proj(joined.to(self.confidence_proj.weight.dtype)).squeeze(-1)
