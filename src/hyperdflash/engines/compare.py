"""Measures how far an engine's states are from the target's own, and decides whether a drafter can train on them.

Shapes: see contracts.py; N is the number of tokens of all prompts, concatenated. Engines use other kernels and often other
number formats, so states never agree bit for bit: the limits bound direction, size and the target's next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hyperdflash.settings import number_between
from hyperdflash.targets.heads import TargetHeads


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``cosine`` is the smallest mean over tokens of any path, ``relative_error`` the largest ||engine - target|| / ||target||;
    ``argmax`` and ``next_token`` are the smallest shares of tokens and of prompts that agree."""

    cosine: float = 0.98
    relative_error: float = 0.2
    argmax: float = 0.9
    next_token: float = 0.9

    def __post_init__(self):
        for name in ("cosine", "argmax", "next_token"):
            number_between(f"limits.{name}", getattr(self, name), 0, 1)
        number_between("limits.relative_error", self.relative_error, 0, 10)


@dataclass(frozen=True)
class Comparison:
    """The result of one server: ``cosine`` has M entries, means over tokens; ``worst_token`` is the largest relative error of a
    token, ``argmax`` the share of tokens where both states give the same next token. These are None without a reference.

    ``next_token`` is the share of prompts where our heads on the engine's last state give the token that the engine generates.
    """

    tokens: int
    max_abs: float | None
    relative_error: float | None
    worst_token: float | None
    cosine: tuple[float, ...] | None
    argmax: float | None
    next_token: float

    def complaint(self, limits: Limits) -> str | None:
        """Describes the first exceeded limit; None where all hold. NaN exceeds every limit."""
        if self.cosine is not None:
            path = min(range(len(self.cosine)), key=lambda j: self.cosine[j])
            if not self.cosine[path] >= limits.cosine:
                return f"path {path} points elsewhere (mean cosine {self.cosine[path]:.3f}, wanted {limits.cosine:g})"
            if not self.relative_error <= limits.relative_error:
                wanted = f"wanted {limits.relative_error:.0%} at most"
                return f"the states are off by {self.relative_error:.0%} of their size, {wanted}"
            if not self.argmax >= limits.argmax:
                return f"{self.argmax:.0%} of the tokens have the same next token, wanted {limits.argmax:.0%}"
        if self.next_token >= limits.next_token:
            return None
        share = f"on {self.next_token:.0%} of the prompts"
        return f"{share} our heads read the engine's own next token from its states, wanted {limits.next_token:.0%}"


@torch.no_grad()
def compare(
    found: Tensor, own: Tensor | None, lengths: Sequence[int], next_tokens: Sequence[int], heads: TargetHeads
) -> Comparison:
    """Compares the engine's states ``found`` [N, M, D] with the reference's ``own`` (or None); ``next_tokens`` has the engine's
    next token of each prompt."""
    predicted = best(heads, found[torch.tensor(lengths).cumsum(0) - 1])
    agreed = sum(a == b for a, b in zip(predicted.tolist(), next_tokens, strict=True)) / len(lengths)
    if own is None:
        return Comparison(len(found), None, None, None, None, None, agreed)
    difference, size = (found.float() - own.float()).flatten(1), own.float().flatten(1)
    return Comparison(
        tokens=len(found),
        max_abs=float(difference.abs().max()),
        relative_error=float(difference.norm() / size.norm()),
        worst_token=float((difference.norm(dim=1) / size.norm(dim=1).clamp_min(1e-12)).max()),
        cosine=tuple(cosine_similarity(found.float(), own.float(), dim=-1).mean(dim=0).tolist()),
        argmax=float((best(heads, found) == best(heads, own)).float().mean()),
        next_token=agreed,
    )


def best(heads: TargetHeads, states: Tensor, rows: int = 256) -> Tensor:
    """[N, M, D] -> [N] int64: the target's most likely next tokens, ``rows`` rows of logits at a time."""
    return torch.cat([heads.logits(heads.collapse(part[None]))[0].argmax(dim=-1) for part in states.split(rows)])
