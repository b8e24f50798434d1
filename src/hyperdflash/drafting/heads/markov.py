"""``markov``: a low-rank bias from the tokens before each slot (DSpark, arXiv 2607.05147).

    z_k = W h_k + W2 b_k,    e_k = W1[x_{k-1}],    W1, W2 [V, r],    W the target's frozen LM head

    vanilla    b_k = e_k
    gated      b_k = sigmoid(L [h_k; e_k]) * e_k
    rnn        [g; c; o] = L [s_{k-1}; e_k; h_k],  s_k = sigmoid(g) s_{k-1} + (1 - sigmoid(g)) tanh(c),  b_k = tanh(o),  s_0 = 0

One product with W serves all slots; only the bias is sequential when drafting. With ``confidence`` the head also estimates the
acceptance of its drafts, c_k = sigmoid(Linear(D + r -> 1)[h_k; e_k]), which objectives/confidence.py trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hyperdflash.contracts import Slots
from hyperdflash.drafting.heads.head import DraftHead, along_block
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.settings import boolean, one_of, positive_int
from hyperdflash.targets.heads import TargetHeads

KINDS = ("vanilla", "gated", "rnn")


@dataclass(frozen=True, kw_only=True)
class Markov:
    """``rank`` r; DSpark uses 256."""

    rank: int = 256
    kind: str = "vanilla"
    confidence: bool = False

    def __post_init__(self):
        positive_int("head.rank", self.rank)
        one_of("head.kind", self.kind, KINDS)
        boolean("head.confidence", self.confidence)

    def build(self, heads: TargetHeads, num_slots: int) -> DraftHead:
        return MarkovHead(self, heads.config.vocab_size, heads.hidden_size)


class MarkovHead(DraftHead):
    """``markov_w1.weight`` and ``markov_w2.weight`` [V, r]; ``gate_proj`` [r, D + r] or ``joint_proj`` [3 r, 2 r + D], and
    ``confidence_proj`` [1, D + r], each with a bias. W2 starts at 0, which makes this the plain LM head, and so does the
    confidence's layer, where every confidence is 1/2."""

    views = ("head", "lm_head")

    def __init__(self, config: Markov, vocab_size: int, width: int):
        super().__init__()
        rank = config.rank
        self.has_confidence = config.confidence
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Embedding(vocab_size, rank)
        self.gate_proj = nn.Linear(width + rank, rank) if config.kind == "gated" else None
        self.joint_proj = nn.Linear(2 * rank + width, 3 * rank) if config.kind == "rnn" else None
        self.confidence_proj = nn.Linear(width + rank, 1) if config.confidence else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        self.markov_w1.weight.normal_(0.0, std, generator=generator)
        for layer in (self.gate_proj, self.joint_proj):
            if layer is not None:
                layer.weight.normal_(0.0, std, generator=generator)

    def logits(self, slots: Slots, heads: TargetHeads) -> FactoredLogits:
        embedded = self.markov_w1(slots.previous)  # [B, A, S, r]
        features = slots.features.to(embedded.dtype)
        bias = self._bias(features, embedded, slots.layout.parents)
        logits = target_logits(slots.features, heads).plus(bias, self.markov_w2.weight)
        if self.confidence_proj is None:
            return logits
        return replace(logits, confidence=self.confidence_proj(torch.cat([features, embedded], dim=-1)).squeeze(-1))

    def _bias(self, features: Tensor, embedded: Tensor, parents: Sequence[int]) -> Tensor:
        """Returns b [B, A, S, r] from the states [B, A, S, D] and e [B, A, S, r]; slot k follows ``parents[k - 1]``."""
        if self.gate_proj is not None:
            return self.gate_proj(torch.cat([features, embedded], dim=-1)).sigmoid() * embedded
        if (joint := self.joint_proj) is None:
            return embedded

        def step(memory: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
            gate, candidate, output = joint(torch.cat([memory, inputs], dim=-1)).chunk(3, dim=-1)
            gate = gate.sigmoid()
            return gate * memory + (1 - gate) * candidate.tanh(), output.tanh()

        return along_block(step, torch.zeros_like(embedded[:, :, 0]), torch.cat([embedded, features], dim=-1), parents)
