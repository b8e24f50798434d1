"""Is a drafted slot accepted, and which token follows? Pure functions of tokens, probabilities and draws.

Shapes: see contracts.py; n <= S slots were drafted. Slot k of the text is x[a + k]; slots are the last axis.

    loop    the text is being written: y ~ q is drafted      ``verify_greedy``, ``verify_sampled``
    replay  the text is the target's already: x ~ p          ``FactoredLogits.is_argmax``, ``sampled_accept``
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperdflash.targets.sampling import draw


def verify_greedy(draft_ids: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Drafts [..., n] and the target's argmax after each token of the block [..., n + 1] -> accepted [...], next token [...].

    Accepted is the number of leading drafts that are the target's; the next token is the target's after them.
    """
    accepted = _leading(draft_ids == target_ids[..., :-1])
    return accepted, target_ids.gather(-1, accepted.unsqueeze(-1)).squeeze(-1)


def verify_sampled(draft_ids: Tensor, q: Tensor, p: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Speculative sampling: drafts [..., n] ~ q [..., n, V], the target's p [..., n + 1, V] -> accepted [...], next [...].

    Draft k is kept with probability min(1, p_k/q_k) if all before it were; the next token comes from the residual of the
    first one rejected, or from p_{n+1} if none was (arXiv 2211.17192, algorithm 1). The n + 1 tokens are then
    distributed as the target's own; see ``sampled_accept`` for why.
    """
    chosen = draft_ids.unsqueeze(-1)
    p_drafted, q_drafted = p[..., :-1, :].gather(-1, chosen).squeeze(-1), q.gather(-1, chosen).squeeze(-1)
    uniform = torch.rand(draft_ids.shape, generator=generator, device=p.device)
    accepted = _leading(keep_draft(p_drafted, q_drafted, uniform))
    row = accepted[..., None, None].expand(*accepted.shape, 1, p.shape[-1])
    q = torch.cat([q, torch.zeros_like(p[..., :1, :])], dim=-2)  # nothing was drafted after the last slot
    weights = residual(p.gather(-2, row).squeeze(-2), q.gather(-2, row).squeeze(-2))
    return accepted, draw(weights, generator)


def keep_draft(p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
    """Keep y ~ q with probability min(1, p(y)/q(y)): [..., n] three times -> bool [..., n]."""
    return uniform * q < p


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), not normalised: [..., V] twice -> [..., V]; p where rounding leaves nothing of it."""
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)


def _leading(kept: Tensor) -> Tensor:
    """Length of the leading run of True: bool [..., n] -> int64 [...]."""
    return kept.to(torch.int64).cumprod(dim=-1).sum(dim=-1)


def sampled_accept(q: Tensor, p: Tensor, uniform: Tensor) -> Tensor:
    """Accept slot k of an already emitted text x with probability min(1, q/p): [..., S] three times -> bool [..., S].

    ``q`` the drafter's probability of x[a + k], ``p`` the target's, ``uniform`` draws in [0, 1).

    Speculative sampling draws y ~ q, keeps it with probability min(1, p(y)/q(y)), else draws from the residual
    max(0, p - q) / Z with Z = sum_y max(0, p - q) = 1 - sum_y min(p, q). The emitted token x is then distributed as p:

        P(x emitted and it was the accepted draft) = q(x) min(1, p(x)/q(x)) = min(p(x), q(x))
        P(x emitted by the residual draw)          = Z * max(0, p(x) - q(x)) / Z = max(0, p(x) - q(x))
        P(x emitted)                               = min(p, q) + max(0, p - q) = p(x)

    Reading it backwards, P(accepted | x emitted) = min(p(x), q(x)) / p(x) = min(1, q(x)/p(x)). With x ~ p this accepts
    with the decoding loop's probability, sum_x p(x) min(1, q/p) = sum_x min(p, q). Mind the direction: the loop's own
    rule min(1, p/q) is for y ~ q, and here the text is the target's.

    Compared as u * p < q, so that p = 0 divides nothing (a token that rounding put just outside the target's nucleus
    counts as p -> 0: accepted where q > 0), q = 0 never accepts and q >= p > 0 always does.
    """
    return uniform * p < q
