"""Computes every statistic that tables and figures show: counts per prompt -> the tidy record.

    1. Sample       counts of one run of one method, an entry per prompt
    2. pool, join   sums of a method's seeds per prompt: the prompt stays the unit of the bootstrap
    3. ratios       accepted length, acceptance per slot, speed: a value per group and its resamples
    4. measure      Rows, and the paired difference to a baseline

Speedup is emitted tokens per second of decoding (the prefill and its token left out) over plain decoding's (AR) on the same
prompts, both summed over prompts before the division. Plain decoding is a sample without slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from hyperdflash.report.bootstrap import MEAN, Estimate, PromptCounts, Ratio, Resamples, pooled_ratio, resample_prompts
from hyperdflash.report.results import MINUS_BASELINE, Row

AUTOREGRESSIVE = "AR"  # name in every record of the target's plain decoding in this project's loop
COUNTS = ("emitted", "accepted", "rounds", "survived", "reached")


@dataclass(frozen=True, eq=False)
class Sample:
    """Counts of one method in one mode at one temperature with one seed, on N prompts of one or several groups.

    ``prompt_ids``, ``groups`` (domain or benchmark) N entries; ``counts`` of its rounds, S = 0 for plain decoding;
    ``looped`` [N] bool, the answer ends in a loop, or the share of a prompt's answers that do; ``seconds`` [N] float64 of all
    rounds, the prefill left out; ``seeds`` of its draws and of the drafter's training; ``run`` names what made it.
    """

    method: str
    temperature: float
    prompt_ids: tuple[str, ...]
    groups: tuple[str, ...]
    counts: PromptCounts
    looped: np.ndarray
    run: str = ""
    mode: str = ""
    seconds: np.ndarray | None = None
    seeds: tuple[int, ...] = (0,)
    without_loops: PromptCounts | None = None

    def __post_init__(self):
        prompts = len(self.prompt_ids)
        if not prompts:
            raise ValueError(f"{self} has no prompts: leave it out, it is then shown as missing")
        seconds = prompts if self.seconds is None else len(self.seconds)
        if not len(self.groups) == len(self.looped) == len(self.counts.rounds) == seconds == prompts:
            raise ValueError(
                f"{self}: {prompts} prompt ids beside {len(self.groups)} groups, {len(self.looped)} loop flags, {seconds} "
                f"times and {len(self.counts.rounds)} rows of counts; each needs one entry per prompt"
            )
        if self.without_loops is None:
            keep = ~np.asarray(self.looped, bool)
            kept = replace(self.counts, emitted=self.counts.emitted * keep, rounds=self.counts.rounds * keep)
            object.__setattr__(self, "without_loops", kept)

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(self.groups))
        mode = f"{self.mode}, " if self.mode else ""
        return f"{self.method} on {names} ({mode}T = {self.temperature:g}, seed {' '.join(map(str, self.seeds))})"

    @property
    def is_plain(self) -> bool:
        """Whether the method has no drafter."""
        return self.counts.num_slots == 0

    def of(self, group: str) -> Sample:
        """Returns the sample of ``group``'s prompts alone."""
        kept = np.array([own == group for own in self.groups])
        names = tuple(name for name, own in zip(self.prompt_ids, kept, strict=True) if own)
        return _combined([self], lambda arrays: arrays[0][kept], prompt_ids=names, groups=(group,) * len(names))


def measure(
    samples: Sequence[Sample],
    baseline: str = "",
    groups: Sequence[str] = (),
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[Row, ...]:
    """Returns the rows of ``samples`` by mode and temperature, methods in order of appearance.

    A method that lacks one of ``groups`` has no MEAN. Intervals: ``num_resamples`` bootstrap samples of the
    prompts, drawn with ``seed`` and shared by all methods. With ``baseline`` the paired difference of tau to that method.
    """

    @cache
    def resamples(names: tuple[str, ...]) -> Resamples:
        return resample_prompts(names, num_resamples, seed)

    rows: list[Row] = []
    for mode, temperature in dict.fromkeys((s.mode, s.temperature) for s in samples):
        batch = [s for s in samples if (s.mode, s.temperature) == (mode, temperature)]
        order = tuple(groups) or tuple(dict.fromkeys(name for s in batch for name in s.groups))
        plain = [s for s in batch if s.method == AUTOREGRESSIVE]
        pooled = {name: pool([s for s in batch if s.method == name], order) for name in dict.fromkeys(s.method for s in batch)}
        _check_same_prompts(pooled, temperature)
        taus = {}
        for name, parts in pooled.items():
            own, keys = join(parts.values()), ("", name, mode, temperature)
            draws = resamples(own.groups)
            found = ratios(own, draws)
            if own.seconds is not None:
                found |= speeds(own, _plain_of_same_seeds(parts, plain), draws)
            taus[name] = found["tau"]
            complete = len(parts) == len(order)
            rows += [r for r in (*_facts(parts, keys), *_rows(found, own, keys)) if complete or r.group != MEAN]
        for name, parts in pooled.items():
            if baseline and name != baseline:
                difference = {MINUS_BASELINE: taus[name].minus(taus[baseline])}
                rows += _rows(difference, join(parts.values()), ("", name, mode, temperature))
    return tuple(rows)


def pool(samples: Sequence[Sample], order: Sequence[str]) -> dict[str, Sample]:
    """Returns one method's samples by group, in ``order``: sums over a prompt's seeds, the mean of their loops."""
    found = {}
    for group in order:
        mine = [s.of(group) for s in samples if group in s.groups]
        if not mine:
            continue
        seeds = tuple(sorted(seed for s in mine for seed in s.seeds))
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{mine[0]} was given more than once: keep one sample per seed, got seeds {list(seeds)}")
        for other in mine[1:]:
            if (other.prompt_ids, other.counts.num_slots) != (mine[0].prompt_ids, mine[0].counts.num_slots):
                raise ValueError(f"{other} and {mine[0]} differ in prompts or draft slots: seeds of one method share both")
        looped = np.mean([s.looped for s in mine], axis=0)
        found[group] = _combined(mine, lambda arrays: np.sum(arrays, axis=0), looped=looped, seeds=seeds)
    return found


def join(parts: Iterable[Sample]) -> Sample:
    """Concatenates the groups of one method into one sample."""
    parts = list(parts)
    return _combined(
        parts,
        np.concatenate,
        prompt_ids=tuple(name for part in parts for name in part.prompt_ids),
        groups=tuple(name for part in parts for name in part.groups),
        seeds=tuple(sorted({seed for part in parts for seed in part.seeds})),
    )


def ratios(sample: Sample, resamples: Resamples) -> dict[str, Ratio]:
    """Returns ratios per group: tau, accepted, tau_without_loops [G]; survival, conditional [G, S]."""
    counts, kept = sample.counts, sample.without_loops
    rounds = np.broadcast_to(counts.rounds[:, None], counts.survived.shape)
    return {
        "tau": pooled_ratio(counts.emitted, counts.rounds, resamples),
        "accepted": pooled_ratio(counts.accepted, counts.rounds, resamples),
        "tau_without_loops": pooled_ratio(kept.emitted, kept.rounds, resamples),
        "survival": pooled_ratio(counts.survived, rounds, resamples),
        "conditional": pooled_ratio(counts.survived, counts.reached, resamples),
    }


def speeds(sample: Sample, plain: dict[str, Sample], resamples: Resamples) -> dict[str, Ratio]:
    """Returns tokens_per_second, and speedup over ``plain``: group -> plain decoding of the same prompts and seeds."""
    speed = pooled_ratio(sample.counts.emitted, sample.seconds, resamples)
    tokens, seconds = np.zeros((2, len(sample.groups)))  # 0 / 0 where there is no plain decoding: no speedup
    for name, own in plain.items():
        mine = [i for i, group in enumerate(sample.groups) if group == name]
        tokens[mine], seconds[mine] = own.counts.emitted, own.seconds
    return {"speedup": speed.over(pooled_ratio(tokens, seconds, resamples)), "tokens_per_second": speed}


def _plain_of_same_seeds(parts: dict[str, Sample], plain: Sequence[Sample]) -> dict[str, Sample]:
    """Returns plain decoding per group with exactly the seeds of ``parts``, without groups that lack one of them."""
    found = {}
    for group, own in parts.items():
        same = [s for s in plain if group in s.groups and set(s.seeds) <= set(own.seeds)]
        if {seed for s in same for seed in s.seeds} == set(own.seeds):
            found |= pool(same, [group])
    return found


def _combined(samples: Sequence[Sample], combine: Callable[[list[np.ndarray]], np.ndarray], **changes) -> Sample:
    """Combines every array of ``samples``; ``changes`` replace other fields of the first one."""

    def counts(part: str) -> PromptCounts:
        return PromptCounts(*(combine([getattr(getattr(s, part), name) for s in samples]) for name in COUNTS))

    arrays = {"counts": counts("counts"), "without_loops": counts("without_loops")}
    arrays["looped"] = combine([s.looped for s in samples])
    arrays["seconds"] = None if samples[0].seconds is None else combine([s.seconds for s in samples])
    return replace(samples[0], **(arrays | changes))


def _facts(parts: dict[str, Sample], keys: tuple) -> Iterator[Row]:
    """Yields counts, with their sum at MEAN, and shares, with their plain mean at MEAN; neither has an interval."""
    shares = {group: float(np.mean(own.looped)) for group, own in parts.items()}
    for group in (*parts, MEAN):
        mine = list(parts.values()) if group == MEAN else [parts[group]]
        prompts = sum(len(own.prompt_ids) for own in mine)
        yield Row(*keys, group, "prompts", None, prompts, n=prompts)
        yield Row(*keys, group, "rounds", None, int(sum(own.counts.rounds.sum() for own in mine)), n=prompts)
        yield Row(*keys, group, "seeds", None, len({seed for own in mine for seed in own.seeds}), n=prompts)
        share = float(np.mean(list(shares.values()))) if group == MEAN else shares[group]
        yield Row(*keys, group, "looping_share", None, share, n=prompts)


def _rows(found: dict[str, Ratio], sample: Sample, keys: tuple) -> Iterator[Row]:
    """Yields a row per group, metric and slot."""
    sizes = {name: sample.groups.count(name) for name in sample.groups} | {MEAN: len(sample.groups)}
    for metric, ratio in found.items():
        for group, estimates in ratio.estimates().items():
            slots = [(None, estimates)] if isinstance(estimates, Estimate) else enumerate(estimates, start=1)
            for slot, e in slots:
                if metric == "tokens_per_second":
                    e = Estimate(math.nan if group == MEAN else e.value, math.nan, math.nan)
                yield Row(*keys, group, metric, slot, e.value, e.low, e.high, sizes[group])


def _check_same_prompts(pooled: dict[str, dict[str, Sample]], temperature: float) -> None:
    """Raises ValueError where methods differ in prompts, so rows are not comparable."""
    reference: dict[str, Sample] = {}
    for parts in pooled.values():
        for group, mine in parts.items():
            first = reference.setdefault(group, mine)
            if mine.prompt_ids != first.prompt_ids:
                raise ValueError(
                    f"{mine.method} and {first.method} were measured on different prompts of {group} at T = {temperature:g} "
                    f"({len(mine.prompt_ids)} and {len(first.prompt_ids)}): evaluate both in one run"
                )
