"""Acceptance of drafted slots and the token that follows: pure functions of tokens, probabilities and random draws.

Shapes: see contracts.py; n <= S drafted slots. Slot k of the text is x[a + k]; slots are the last axis.

    loop    writes the text: the draft is y ~ q              ``verify_greedy``, ``verify_sampled``
    replay  reads the target's own text: x ~ p               ``FactoredLogits.is_argmax``, ``sampled_accept``
"""

import torch
from torch import Tensor

from hyperdflash.targets.sampling import draw


def verify_greedy(draft_ids: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Verifies drafts [..., n] against the target's argmax after each token of the block [..., n + 1]. Returns the number of
    leading drafts that equal the target's tokens [...], and the target's token after them [...]."""
    accepted = _leading(draft_ids == target_ids[..., :-1])
    return accepted, target_ids.gather(-1, accepted.unsqueeze(-1)).squeeze(-1)


def verify_sampled(draft_ids: Tensor, q: Tensor, p: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Verifies drafts [..., n] ~ q [..., n, V] by speculative sampling from the target's p [..., n + 1, V].

    Returns the number of accepted drafts [...] and the next token [...]. Draft k is accepted with probability min(1, p_k/q_k)
    if all earlier ones are; the next token comes from the residual of the first rejected one, or from p_{n+1} if none is
    (arXiv 2211.17192, algorithm 1). The tokens then have the target's own distribution; ``sampled_accept`` shows why.
    """
    chosen = draft_ids.unsqueeze(-1)
    p_drafted, q_drafted = p[..., :-1, :].gather(-1, chosen).squeeze(-1), q.gather(-1, chosen).squeeze(-1)
    uniform = torch.rand(draft_ids.shape, generator=generator, device=p.device)
    accepted = _leading(keep_draft(p_drafted, q_drafted, uniform))
    row = accepted[..., None, None].expand(*accepted.shape, 1, p.shape[-1])
    q = torch.cat([q, torch.zeros_like(p[..., :1, :])], dim=-2)  # there is no draft after the last slot
    weights = residual(p.gather(-2, row).squeeze(-2), q.gather(-2, row).squeeze(-2))
    return accepted, draw(weights, generator)


def keep_draft(p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
    """Accepts y ~ q with probability min(1, p(y)/q(y)): [..., n] three times -> bool [..., n]."""
    return uniform * q < p


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Returns max(0, p - q) without normalization: [..., V] twice -> [..., V]; p where rounding leaves no mass."""
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)


def _leading(kept: Tensor) -> Tensor:
    """Returns the length of the leading run of True: bool [..., n] -> int64 [...]."""
    return kept.to(torch.int64).cumprod(dim=-1).sum(dim=-1)


def sampled_accept(q: Tensor, p: Tensor, uniform: Tensor) -> Tensor:
    """Accepts slot k of a finished text x with probability min(1, q/p): [..., S] three times -> bool [..., S].

    ``q`` is the drafter's probability of x[a + k], ``p`` the target's; ``uniform`` are draws in [0, 1).

    Speculative sampling draws y ~ q, accepts it with probability min(1, p(y)/q(y)), and otherwise draws from the residual
    max(0, p - q) / Z with Z = sum_y max(0, p - q) = 1 - sum_y min(p, q). The emitted token x then has distribution p:

        P(x emitted as the accepted draft)         = q(x) min(1, p(x)/q(x)) = min(p(x), q(x))
        P(x emitted by the residual draw)          = Z * max(0, p(x) - q(x)) / Z = max(0, p(x) - q(x))
        P(x emitted)                               = min(p, q) + max(0, p - q) = p(x)

    By Bayes' rule P(accepted | x emitted) = min(p(x), q(x)) / p(x) = min(1, q(x)/p(x)). With x ~ p this accepts with the
    decoding loop's probability, sum_x p(x) min(1, q/p) = sum_x min(p, q). The direction matters: the loop's rule min(1, p/q)
    holds for y ~ q, whereas here the text is the target's.

    The comparison u * p < q never divides by p = 0: a token that rounding puts just outside the target's nucleus counts as
    p -> 0 and is accepted if q > 0. q = 0 never accepts, and q >= p > 0 always does.
    """
    return uniform * p < q
