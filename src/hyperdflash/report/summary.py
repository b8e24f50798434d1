"""Results of an evaluation -> every number that tables and figures show.

Legend: N prompts, S draft slots. A number has one place: here; renderers only format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hyperdflash.report.bootstrap import MEAN, Estimate, PromptCounts, Ratio, Resamples, pooled_ratio, resample_prompts


@dataclass(frozen=True)
class MethodResult:
    """One method at one temperature, a row a prompt.

    ``prompt_ids``, ``domains`` N entries; ``looped`` [N] bool (the answer ends in a loop); ``run_id`` the run that made
    it. Within a temperature all methods have the same prompts in the same order: they were replayed on the same texts.
    """

    name: str
    temperature: float
    prompt_ids: tuple[str, ...]
    domains: tuple[str, ...]
    counts: PromptCounts
    looped: np.ndarray
    run_id: str = ""

    def __post_init__(self):
        prompts = len(self.prompt_ids)
        if not len(self.domains) == len(self.looped) == len(self.counts.rounds) == prompts:
            raise ValueError(
                f"{self.name}: {prompts} prompt ids beside {len(self.domains)} domains, {len(self.looped)} loop flags "
                f"and {len(self.counts.rounds)} rows of counts; each needs one entry a prompt"
            )


@dataclass(frozen=True)
class GroupSummary:
    """One method on one domain, or on MEAN, the plain mean over domains (there ``prompts`` and ``rounds`` are sums).

    ``looping_share`` of the prompts; ``tau_without_loops`` NaN where all of a domain's answers loop.
    ``survival``, ``conditional`` S entries.
    """

    prompts: int
    rounds: int
    tau: Estimate
    accepted: Estimate
    tau_without_loops: Estimate
    looping_share: float
    survival: tuple[Estimate, ...]
    conditional: tuple[Estimate, ...]


@dataclass(frozen=True)
class MethodSummary:
    """``groups`` domain or MEAN -> numbers."""

    name: str
    temperature: float
    num_slots: int
    run_id: str
    groups: dict[str, GroupSummary]


@dataclass(frozen=True)
class Difference:
    """tau(``name``) - tau(``baseline``) on the same resampled prompts, a group."""

    name: str
    baseline: str
    temperature: float
    tau: dict[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """What a report is rendered from; ``groups`` the domains, then MEAN."""

    methods: tuple[MethodSummary, ...]
    differences: tuple[Difference, ...]
    groups: tuple[str, ...]
    baseline: str
    num_resamples: int
    seed: int

    @property
    def temperatures(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(m.temperature for m in self.methods))

    def at(self, temperature: float) -> tuple[MethodSummary, ...]:
        return tuple(m for m in self.methods if m.temperature == temperature)

    def difference(self, name: str, temperature: float) -> Difference | None:
        """None for the baseline itself."""
        found = [d for d in self.differences if (d.name, d.temperature) == (name, temperature)]
        return found[0] if found else None


def summarise(results: Sequence[MethodResult], baseline: str, num_resamples: int = 2000, seed: int = 0) -> Summary:
    """All statistics of ``results``; every other method is compared with ``baseline`` at its own temperature."""
    if not results:
        raise ValueError("no results to report; run python -m src.evaluate first")
    methods, differences, groups = [], [], None
    for temperature in dict.fromkeys(r.temperature for r in results):
        batch = [r for r in results if r.temperature == temperature]
        _check_paired(batch, baseline)
        resamples = resample_prompts(batch[0].domains, num_resamples, seed)
        if groups is not None and groups != resamples.groups:
            raise ValueError(f"temperatures cover different domains: got {groups[:-1]} and {resamples.groups[:-1]}")
        groups = resamples.groups
        taus = {r.name: _tau(r.counts, resamples) for r in batch}
        methods += [_method(r, resamples) for r in batch]
        differences += [
            Difference(r.name, baseline, temperature, taus[r.name].minus(taus[baseline]).estimates())
            for r in batch
            if r.name != baseline
        ]
    return Summary(tuple(methods), tuple(differences), groups, baseline, num_resamples, seed)


def _check_paired(batch: Sequence[MethodResult], baseline: str) -> None:
    names = [r.name for r in batch]
    at = f"at temperature {batch[0].temperature:g}"
    if len(set(names)) != len(names):
        raise ValueError(f"methods {at} need distinct names, got {names}")
    if baseline not in names:
        raise ValueError(f"the baseline {baseline!r} has no result {at}; got {names}")
    first = batch[0]
    for result in batch[1:]:
        if (result.prompt_ids, result.domains) != (first.prompt_ids, first.domains):
            raise ValueError(
                f"{result.name} and {first.name} {at} were measured on different prompts; paired differences need the "
                "same prompts in the same order: evaluate both on the same answers"
            )
        if not np.array_equal(result.looped, first.looped):
            raise ValueError(f"{result.name} and {first.name} {at} disagree on which answers loop: texts differ")


def _tau(counts: PromptCounts, resamples: Resamples) -> Ratio:
    return pooled_ratio(counts.emitted, counts.rounds, resamples)


def _method(result: MethodResult, resamples: Resamples) -> MethodSummary:
    looped = np.asarray(result.looped, bool)
    without_loops = answers_kept(result.counts, ~looped)
    groups = group_summaries(result.counts, without_loops, looped, result.domains, resamples)
    return MethodSummary(result.name, result.temperature, result.counts.num_slots, result.run_id, groups)


def answers_kept(counts: PromptCounts, keep: np.ndarray) -> PromptCounts:
    """``counts`` with the tokens and rounds of the answers outside ``keep`` [N] bool left out."""
    return replace(counts, emitted=counts.emitted * keep, rounds=counts.rounds * keep)


def group_summaries(
    counts: PromptCounts,
    without_loops: PromptCounts,
    looped: np.ndarray,
    domains: Sequence[str],
    resamples: Resamples,
) -> dict[str, GroupSummary]:
    """A row a prompt -> a GroupSummary a domain, and MEAN.

    ``without_loops`` the counts of the answers that do not loop, ``looped`` [N] the share of a prompt's answers that do
    (bool where each has one), ``domains`` N entries in the order of ``resamples``.
    """
    rounds = np.broadcast_to(counts.rounds[:, None], counts.survived.shape)
    tau = _tau(counts, resamples).estimates()
    accepted = pooled_ratio(counts.accepted, counts.rounds, resamples).estimates()
    tau_without_loops = _tau(without_loops, resamples).estimates()
    survival = pooled_ratio(counts.survived, rounds, resamples).estimates()
    conditional = pooled_ratio(counts.survived, counts.reached, resamples).estimates()
    groups, shares = {}, []
    for group in resamples.groups:
        members = np.array([group in (d, MEAN) for d in domains])
        shares.append(float(np.mean(shares)) if group == MEAN else float(np.mean(looped[members])))
        groups[group] = GroupSummary(
            prompts=int(members.sum()),
            rounds=int(counts.rounds[members].sum()),
            tau=tau[group],
            accepted=accepted[group],
            tau_without_loops=tau_without_loops[group],
            looping_share=shares[-1],
            survival=survival[group],
            conditional=conditional[group],
        )
    return groups
