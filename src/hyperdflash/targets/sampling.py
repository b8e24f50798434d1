"""Turns logits into the distribution for sampling: temperature, then nucleus; one rule for target and drafter."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperdflash.settings import check_sampling


def probabilities(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Returns fp32 probabilities [..., V] of logits [..., V] at ``temperature`` > 0. ``top_p`` keeps the fewest most probable
    tokens whose mass reaches it and renormalizes, as transformers' TopPLogitsWarper."""
    check_sampling(temperature, top_p)
    assert temperature > 0, "greedy decoding has no distribution; compare argmax instead"
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p == 1.0:
        return probs
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1) - ranked  # mass of strictly more probable tokens
    ranked = ranked.masked_fill(before >= top_p, 0.0)
    kept = torch.zeros_like(probs).scatter(-1, order, ranked)
    return kept / kept.sum(dim=-1, keepdim=True)


def token_probabilities(logits: Tensor, token_ids: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Returns the probability of one token per row: logits [..., V], token_ids [...] int64 -> fp32 [...]."""
    return probabilities(logits, temperature, top_p).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws one token per row in proportion to ``weights`` [..., V] >= 0 (no row all zero) -> int64 [...]."""
    rows = weights.reshape(-1, weights.shape[-1])
    return torch.multinomial(rows, 1, generator=generator).view(weights.shape[:-1])


def generator_for(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator whose draws depend on ``name`` alone, not on earlier draws."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens from logits; ``generator`` is on the logits' device and unused at temperature 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self):
        check_sampling(self.temperature, self.top_p)

    def probabilities(self, logits: Tensor) -> Tensor | None:
        """Returns fp32 probabilities [..., V] of logits [..., V]; None at temperature 0."""
        return probabilities(logits, self.temperature, self.top_p) if self.temperature > 0 else None

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns ids [...] and the probabilities [..., V] behind them; argmax and None at temperature 0."""
        probs = self.probabilities(logits)
        return (logits.argmax(dim=-1), None) if probs is None else (draw(probs, self.generator), probs)
