"""Is a drafted slot accepted? Pure functions of one slot's tokens or probabilities.

Shapes: see src/contracts.py. Slot k of the text is x[a + k]; slots are the last axis, S of them.
"""

from __future__ import annotations

from torch import Tensor


def greedy_accept(draft_ids: Tensor, labels: Tensor) -> Tensor:
    """The drafter's argmax is the target's greedy token: int64 [..., S], int64 [..., S] -> bool [..., S]."""
    return draft_ids == labels


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
