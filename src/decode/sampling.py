"""Logits to the distribution that is sampled from: temperature, then nucleus. One rule for target and drafter alike."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises ValueError where the two do not describe a sampling rule; temperature 0 is greedy."""
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def probabilities(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """[..., V] -> fp32 probabilities [..., V] at ``temperature`` > 0.

    ``top_p`` keeps the smallest set of most probable tokens whose mass reaches it (the token that crosses the
    threshold is kept, so at least one is) and renormalises; transformers' ``TopPLogitsWarper`` draws the same line.
    """
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
    """Probability of one token a row: logits [..., V], token_ids [...] int64 -> fp32 [...]."""
    return probabilities(logits, temperature, top_p).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
