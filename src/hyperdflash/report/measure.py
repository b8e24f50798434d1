"""Computes every statistic that tables and figures show: counts per prompt -> the tidy record.

    1. Sample      counts of one method, an entry per prompt
    2. ratios      accepted length, acceptance per slot, speed: a value per group and its resamples
    3. measure     Rows, and the paired difference to a baseline

Speedup is emitted tokens per second of decoding (the prefill and its token left out) over plain decoding's (AR) on the same
prompts, both summed over prompts before the division. Plain decoding is a sample without slots.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hyperdflash.report.bootstrap import LEVEL, MEAN, Estimate, PromptCounts, Ratio, Resamples, pooled_ratio, resample_prompts
from hyperdflash.report.results import MINUS_BASELINE, Results, Row

AUTOREGRESSIVE = "AR"  # name in every record of the target's plain decoding in this project's loop


@dataclass(frozen=True, eq=False)
class Sample:
    """Counts of one method in one mode at one temperature, on N prompts. ``prompt_ids``, ``groups`` (domain or benchmark) N
    entries; ``counts`` of its rounds, S = 0 for plain decoding; ``looped`` [N] bool, the answer ends in a loop; ``seconds`` [N]
    float64 of all rounds, without the prefill; ``run`` names what made it."""

    method: str
    temperature: float
    prompt_ids: tuple[str, ...]
    groups: tuple[str, ...]
    counts: PromptCounts
    looped: np.ndarray
    run: str = ""
    mode: str = ""
    seconds: np.ndarray | None = None

    def __post_init__(self):
        timed = self.groups if self.seconds is None else self.seconds
        sizes = [len(own) for own in (self.prompt_ids, self.groups, self.looped, self.counts.rounds, timed)]
        if len(set(sizes)) > 1:
            raise ValueError(f"{self.method}: {sizes} ids, groups, loops, counts, times; each needs one entry per prompt")


def measure(
    samples: Sequence[Sample], baseline: str = "", groups: Sequence[str] = (), num_resamples: int = 2000, seed: int = 0
) -> Results:
    """Returns the rows of ``samples``, one per method, mode and temperature; ValueError where methods differ in their prompts.
    Without MEAN where the prompts lack one of ``groups``. Intervals: ``num_resamples`` bootstrap samples of the prompts, drawn
    with ``seed`` and shared by all methods. With ``baseline`` the paired difference of tau to that method."""
    keys = [(s.method, s.mode, s.temperature) for s in samples]
    assert keys and len(set(keys)) == len(keys), f"samples, one per method, mode and temperature: {keys}"
    rows: list[Row] = []
    for mode, temperature in dict.fromkeys((s.mode, s.temperature) for s in samples):
        batch = [s for s in samples if (s.mode, s.temperature) == (mode, temperature)]
        draws = resample_prompts(batch[0].groups, num_resamples, seed)
        plain = next((s for s in batch if s.method == AUTOREGRESSIVE), None)
        found: dict[str, dict[str, Ratio]] = {}
        for own in batch:
            if (own.prompt_ids, own.groups) != (batch[0].prompt_ids, batch[0].groups):
                raise ValueError(
                    f"{own.method} and {batch[0].method} were measured on different prompts at T = {temperature:g} "
                    f"({len(own.prompt_ids)} and {len(batch[0].prompt_ids)}): evaluate both in one run"
                )
            found[own.method] = own_ratios = ratios(own.counts, draws)
            kept = ~own.looped
            own_ratios["tau_without_loops"] = pooled_ratio(own.counts.emitted * kept, own.counts.rounds * kept, draws)
            own_ratios["looping_share"] = pooled_ratio(own.looped, np.ones(len(own.looped)), draws)
            if plain is not None and own.seconds is not None:
                speed = pooled_ratio(own.counts.emitted, own.seconds, draws)
                own_ratios["speedup"] = speed.over(pooled_ratio(plain.counts.emitted, plain.seconds, draws))
                own_ratios["tokens_per_second"] = speed
            rows += [*_numbers(own), *_rows(own_ratios, own)]
        for own in batch if baseline else ():
            if own.method != baseline:
                rows += _rows({MINUS_BASELINE: found[own.method]["tau"].minus(found[baseline]["tau"])}, own)
    names = {row.group for row in rows}
    kept = tuple(row for row in rows if row.group != MEAN or names >= set(groups))
    details = {("", s.method): {"run": s.run} for s in samples}
    return Results(kept, details, {"level": LEVEL, "resamples": num_resamples, "seed": seed, "unit": "prompt"})


def ratios(counts: PromptCounts, resamples: Resamples) -> dict[str, Ratio]:
    """Returns ratios per group: tau, accepted [G]; survival, conditional [G, S]."""
    rounds = np.broadcast_to(counts.rounds[:, None], counts.survived.shape)
    return {
        "tau": pooled_ratio(counts.emitted, counts.rounds, resamples),
        "accepted": pooled_ratio(counts.accepted, counts.rounds, resamples),
        "survival": pooled_ratio(counts.survived, rounds, resamples),
        "conditional": pooled_ratio(counts.survived, counts.reached, resamples),
    }


def _numbers(own: Sample) -> Iterator[Row]:
    for group in (*dict.fromkeys(own.groups), MEAN):
        mine = np.array([group in (name, MEAN) for name in own.groups])
        for metric, number in (("prompts", mine.sum()), ("rounds", own.counts.rounds[mine].sum())):
            yield Row("", own.method, own.mode, own.temperature, group, metric, None, int(number), n=int(mine.sum()))


def _rows(found: dict[str, Ratio], own: Sample) -> Iterator[Row]:
    sizes = {name: own.groups.count(name) for name in own.groups} | {MEAN: len(own.groups)}
    for metric, ratio in found.items():
        for group, estimates in ratio.estimates().items():
            slots = [(None, estimates)] if isinstance(estimates, Estimate) else enumerate(estimates, start=1)
            for slot, e in slots:
                if metric == "tokens_per_second":
                    e = Estimate(math.nan if group == MEAN else e.value, math.nan, math.nan)
                place = ("", own.method, own.mode, own.temperature, group, metric, slot)
                yield Row(*place, e.value, e.low, e.high, sizes[group])
