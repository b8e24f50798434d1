"""Bootstraps over prompts: pooled ratios within a domain, their plain mean over domains, 95% percentile intervals.

Legend: N prompts, S draft slots, R resamples, G groups (the domains in order of first appearance, then MEAN).

A resample draws, within each domain, as many prompts as the domain has, with replacement. It holds the number of draws per
prompt, so every statistic is a ratio of two matrix products. Methods on the same prompts share the resamples, so differences
are paired. Prompts are the unit because rounds of one answer are not independent. The interval covers the choice of prompts,
not the training seed nor the target.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

MEAN = "mean"
LEVEL = 0.95


@dataclass(frozen=True)
class PromptCounts:
    """Sums per prompt, int64: ``emitted``, ``accepted``, ``rounds`` [N]; ``survived``, ``reached`` [N, S]. ``survived`` rounds
    with accepted >= k; ``reached`` rounds with accepted >= k - 1 whose text has a slot k."""

    emitted: np.ndarray
    accepted: np.ndarray
    rounds: np.ndarray
    survived: np.ndarray
    reached: np.ndarray

    def __post_init__(self):
        for field in fields(self):
            wanted = self.survived.shape if field.name in ("survived", "reached") else self.survived.shape[:1]
            if (got := getattr(self, field.name).shape) != wanted:
                raise ValueError(f"PromptCounts.{field.name} must be {list(wanted)} beside survived [N, S], got {list(got)}")

    @property
    def num_slots(self) -> int:
        return self.survived.shape[1]


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95% interval; NaN where undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resamples:
    """``members`` domain -> [n] rows of its prompts; ``weights`` domain -> [R, n] float64 draws, each row sums to n."""

    members: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]

    @property
    def groups(self) -> tuple[str, ...]:
        return (*self.members, MEAN)


def resample_prompts(domains: Sequence[str], num_resamples: int = 2000, seed: int = 0) -> Resamples:
    """Draws within each of ``domains`` (one per prompt) as many prompts as it has."""
    if not len(domains):
        raise ValueError("nothing to resample: got no prompts; run the evaluation on at least one prompt")
    if MEAN in domains:
        raise ValueError(f"a domain cannot be called {MEAN!r}: that row is the plain mean over domains")
    generator = np.random.default_rng(seed)
    members = {name: np.flatnonzero([d == name for d in domains]) for name in dict.fromkeys(domains)}
    weights = {
        name: generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=num_resamples).astype(np.float64)
        for name, rows in members.items()
    }
    return Resamples(members, weights)


@dataclass(frozen=True)
class Ratio:
    """A pooled ratio per group: ``value`` [G, ...] of all prompts, ``resampled`` [R, G, ...]."""

    groups: tuple[str, ...]
    value: np.ndarray
    resampled: np.ndarray

    def estimates(self) -> dict[str, Estimate] | dict[str, tuple[Estimate, ...]]:
        """Returns an Estimate per group, or a tuple of S where the ratio has slots."""
        bounds = np.stack([self.value, *interval(self.resampled)], axis=-1).tolist()
        if self.value.ndim == 1:
            return {group: Estimate(*own) for group, own in zip(self.groups, bounds, strict=True)}
        return {group: tuple(Estimate(*slot) for slot in own) for group, own in zip(self.groups, bounds, strict=True)}

    def minus(self, other: Self) -> Self:
        """Returns the paired difference of two ratios of the same Resamples."""
        assert self.groups == other.groups and self.resampled.shape == other.resampled.shape
        return Ratio(self.groups, self.value - other.value, self.resampled - other.resampled)

    def over(self, other: Self) -> Self:
        """Returns the paired quotient of two ratios without slots per domain, and the plain mean of the quotients."""
        assert self.groups == other.groups and self.resampled.shape == other.resampled.shape

        def quotient(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
            own = _divide(top[..., :-1], bottom[..., :-1])
            return np.append(own, own.mean(axis=-1, keepdims=True), axis=-1)

        return Ratio(self.groups, quotient(self.value, other.value), quotient(self.resampled, other.resampled))


def pooled_ratio(numerator: np.ndarray, denominator: np.ndarray, resamples: Resamples) -> Ratio:
    """Returns sum(numerator) / sum(denominator) per domain, and their plain mean; both arguments [N] or [N, S]. A domain whose
    denominator is 0 (one-token answers, a slot that no round reaches) is NaN, and so is the plain mean."""
    assert len(numerator) == len(denominator) == sum(map(len, resamples.members.values()))
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    values, resampled = [], []
    for domain, members in resamples.members.items():
        top, bottom, weights = numerator[members], denominator[members], resamples.weights[domain]
        values.append(_divide(top.sum(axis=0), bottom.sum(axis=0)))
        resampled.append(_divide(weights @ top, weights @ bottom))
    values.append(np.mean(values, axis=0))
    resampled.append(np.mean(resampled, axis=0))
    return Ratio(resamples.groups, np.stack(values), np.stack(resampled, axis=1))


def interval(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the percentile interval over axis 0: [R, ...] -> (low [...], high [...]). Leaves out resamples where the
    statistic is undefined; bounds are NaN where all are."""
    tail = (1 - LEVEL) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a column of NaN
        quantile = np.nanquantile if np.isnan(resampled).any() else np.quantile
        low, high = quantile(resampled, [tail, 1 - tail], axis=0)
    return low, high


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Divides; 0 / 0 is NaN without a warning."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=np.asarray(bottom) != 0)
