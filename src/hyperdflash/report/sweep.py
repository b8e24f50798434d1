"""Runs of a sweep -> every number that its tables, figures and page show. A number has one place: here.

Legend: N prompts, S draft slots, R resamples, G groups (domains, then MEAN).

A cell is what the seeds of one choice of the axes on one target share. Two intervals stand beside its mean over seeds:
over seeds (Student's t, needs two), and over prompts (bootstrap, the same resampled prompts for all runs of a target).
Differences to the baseline are paired by seed and by prompt. A verdict needs both intervals to leave out 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hyperdflash.report.bootstrap import MEAN, Estimate, Ratio, Resamples, pooled_ratio, resample_prompts
from hyperdflash.report.sweep_runs import Member, TrainedRun, marks

AHEAD, BEHIND, EVEN = "ahead", "behind", "cannot be told apart"
ALONE = "one seed"
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 beyond
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Difference:
    """tau minus the baseline's, mean over ``seeds`` that both have: group -> interval over seeds, and over prompts."""

    seeds: tuple[int, ...]
    over_seeds: dict[str, Estimate]
    over_prompts: dict[str, Estimate]

    @property
    def verdict(self) -> str:
        """AHEAD or BEHIND only where both intervals leave out 0; with one seed the prompts' alone, and said so."""
        parts = [self.over_prompts[MEAN]] + ([self.over_seeds[MEAN]] if len(self.seeds) > 1 else [])
        word = AHEAD if all(e.low > 0 for e in parts) else BEHIND if all(e.high < 0 for e in parts) else EVEN
        return word if len(self.seeds) > 1 else f"{word} ({ALONE})"


@dataclass(frozen=True)
class Cell:
    """``tau_over_seeds``, ``tau_over_prompts`` group -> Estimate (the same value); ``survival``, ``conditional`` S entries of
    the plain mean over domains, intervals over seeds (over prompts where there is one seed); ``curve`` [V, 4] step, mean
    validation tau over seeds, lowest and highest seed; ``difference`` None for the baseline and without a common seed;
    ``curve_difference`` its counterpart by step, at the steps of both curves: step -> interval over the seeds of both."""

    target: str
    choices: dict[str, str]
    label: str
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    steps: int
    parameters: int
    tau_over_seeds: dict[str, Estimate]
    tau_over_prompts: dict[str, Estimate]
    survival: tuple[Estimate, ...]
    conditional: tuple[Estimate, ...]
    curve: np.ndarray
    difference: Difference | None
    is_baseline: bool
    curve_difference: dict[int, Estimate] = field(default_factory=dict)
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepReport:
    """``axes`` axis -> values in order; ``groups`` the domains, then MEAN; ``left_out`` run -> why; ``missing`` labels of jobs
    without a finished run, with the reason where it is known."""

    name: str
    axes: dict[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    groups: tuple[str, ...]
    baseline: str
    num_resamples: int
    prompts: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.target for cell in self.cells))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.label for cell in self.cells))

    @property
    def num_slots(self) -> int:
        return max(len(cell.survival) for cell in self.cells)

    def at(self, target: str) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.target == target)


def label_of(choices: dict[str, str]) -> str:
    """``pre_gate · kl off``: values that say what they are stand alone."""
    named = (v if k in ("variant", "reducer", "conditioning", "run") else f"{k} {v}" for k, v in choices.items() if v != "")
    return " · ".join(named) or "the runs"


def summarise_sweep(
    name: str,
    axes: dict[str, tuple[str, ...]],
    members: Sequence[Member],
    baseline: dict[str, str],
    *,
    num_resamples: int = 2000,
    left_out: dict[str, str] | None = None,
    missing: Sequence[str] = (),
) -> SweepReport:
    """``baseline`` axis -> value; ValueError where no run has it, or where the runs of a target cannot be paired."""
    if not members:
        told = "".join(f"; {run} {why}" for run, why in list((left_out or {}).items())[:3])
        raise ValueError(f"no finished run of {name} to report: run `python -m src.train -m sweep={name}` first{told}")
    axes = {axis: values for axis, values in axes.items() if axis not in ("seed", "target")}
    wanted = {axis: value for axis, value in baseline.items() if axis in axes}
    reservations = marks(members)
    cells: list[Cell] = []
    prompts: dict[str, int] = {}
    groups: tuple[str, ...] = ()
    left_out = dict(left_out or {})
    for target in dict.fromkeys(member.run.target for member in members):
        here = [member for member in members if member.run.target == target]
        _check_pairing([member.run for member in here], target)
        first = here[0].run
        resamples = resample_prompts(first.domains, num_resamples)
        if groups and set(resamples.groups) != set(groups):
            raise ValueError(f"targets were validated on different domains: {groups[:-1]} and {resamples.groups[:-1]}")
        groups = groups or resamples.groups
        prompts[target] = len(first.domains)
        together: dict[tuple, dict[int, TrainedRun]] = {}
        for member in here:
            key = tuple(member.choices[axis] for axis in axes)
            kept = together.setdefault(key, {}).setdefault(member.run.seed, member.run)
            if kept is not member.run:
                left_out[member.run.directory.name] = _doubled(member.run, kept)
        order = sorted(together, key=lambda key: [axes[axis].index(value) for axis, value in zip(axes, key, strict=True)])
        taus = {key: {s: _tau(run, resamples) for s, run in sorted(together[key].items())} for key in order}
        bases = {key: _base_of(key, tuple(axes), wanted, order) for key in order}
        if not set(bases.values()) & set(order):
            have = ", ".join(label_of(dict(zip(axes, key, strict=True))) for key in order)
            raise ValueError(
                f"the baseline {label_of(wanted)} has no finished run on {target}: give baseline=AXIS=VALUE of {have}"
            )
        for key in order:
            choices = dict(zip(axes, key, strict=True))
            runs = [run for _, run in sorted(together[key].items())]
            base = bases[key]
            difference = _difference(taus[key], taus[base]) if base in taus and key != base else None
            steps = _curve_difference(together[key], together[base]) if difference else {}
            told = [f"seed {run.seed}: {reservations[run.directory]}" for run in runs if run.directory in reservations]
            cells.append(_cell(target, choices, runs, taus[key], resamples, difference, key == base, steps, told))
    free = [axis for axis in axes if wanted and axis not in wanted]
    told = label_of(wanted) + (f" at the same {', '.join(free)}" if free else "")
    label = told if wanted else next(cell.label for cell in cells if cell.is_baseline)
    return SweepReport(name, axes, tuple(cells), groups, label, num_resamples, prompts, left_out, tuple(missing))


def _base_of(key: tuple, axes: tuple[str, ...], wanted: dict[str, str], order: list[tuple]) -> tuple:
    """What ``key`` is compared with: the baseline's values, and its own on the axes that the baseline leaves open."""
    return tuple(wanted.get(axis, value) for axis, value in zip(axes, key, strict=True)) if wanted else order[0]


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and its 95% interval by Student's t; without a second seed the interval is not defined."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    t = T975[len(values) - 2] if len(values) - 2 < len(T975) else 1.96
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def verdict_lines(report: SweepReport) -> list[str]:
    """A sentence a choice: where it stands to the baseline on every target, and whether the targets agree."""
    lines = []
    for label in report.labels:
        cells = [cell for cell in report.cells if cell.label == label and cell.difference]
        if not cells:
            continue
        verdicts = {cell.target: cell.difference.verdict for cell in cells}
        words = set(verdicts.values())
        if len(report.targets) == 1:
            told = f"{words.pop()} on {report.targets[0]}, the only target"
        elif len(cells) < len(report.targets):
            told = "; ".join(f"{v} on {t}" for t, v in verdicts.items()) + "; not run on every target"
        elif len(words) == 1 and words <= {AHEAD, BEHIND}:
            told = f"{words.pop()}: agrees across targets ({', '.join(verdicts)})"
        elif len(words) == 1:
            word = words.pop()
            told = f"{word} on {'any' if word == EVEN else 'each'} of {', '.join(verdicts)}"
        else:
            told = "; ".join(f"{v} on {t}" for t, v in verdicts.items()) + ": targets do not agree"
        lines.append(f"{label} against {report.baseline}: {told}")
    return lines


def _check_pairing(runs: Sequence[TrainedRun], target: str) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.fingerprint != first.fingerprint:
            raise ValueError(
                f"{run.directory.name} and {first.directory.name} were trained on different weights of {target} "
                f"({run.fingerprint}, {first.fingerprint}): report them apart with runs="
            )
        if (run.prompt_ids, run.domains, run.counts.num_slots) != (first.prompt_ids, first.domains, first.counts.num_slots):
            raise ValueError(
                f"{run.directory.name} and {first.directory.name} were validated on different prompts or slots, so no "
                "difference can be paired: report them apart with runs="
            )


def _tau(run: TrainedRun, resamples: Resamples) -> Ratio:
    return pooled_ratio(run.counts.emitted, run.counts.rounds, resamples)


def _mean(ratios: Sequence[Ratio]) -> Ratio:
    """Over seeds, a resample at a time."""
    value = np.mean([ratio.value for ratio in ratios], axis=0)
    return Ratio(ratios[0].groups, value, np.mean([ratio.resampled for ratio in ratios], axis=0))


def _by_seed(ratios: Sequence[Ratio]) -> dict[str, Estimate]:
    return {group: over_seeds([ratio.value[i] for ratio in ratios]) for i, group in enumerate(ratios[0].groups)}


def _difference(own: dict[int, Ratio], base: dict[int, Ratio]) -> Difference | None:
    shared = [seed for seed in own if seed in base]
    if not shared:
        return None
    ratios = [own[seed].minus(base[seed]) for seed in shared]
    return Difference(tuple(shared), _by_seed(ratios), _mean(ratios).estimates())


def _curve_difference(own: dict[int, TrainedRun], base: dict[int, TrainedRun]) -> dict[int, Estimate]:
    """Paired by seed; steps at which every seed of both cells was validated."""
    curves = [{seed: dict(run.curve) for seed, run in runs.items()} for runs in (own, base)]
    steps = set.intersection(*(set(curve) for runs in curves for curve in runs.values()))
    shared = [seed for seed in own if seed in base]
    return {int(step): over_seeds([curves[0][s][step] - curves[1][s][step] for s in shared]) for step in sorted(steps)}


def _doubled(run: TrainedRun, kept: TrainedRun) -> str:
    names = [name for name in run.decided if run.decided[name] != kept.decided.get(name)]
    return (
        f"has the choices, seed and target of {kept.directory.name}, which is reported; they differ in "
        f"{', '.join(names) or 'nothing that decides a run'}: report them apart with runs="
    )


def _cell(target, choices, runs, taus, resamples, difference, is_baseline, steps, told) -> Cell:
    ratios = list(taus.values())
    return Cell(
        target=target,
        choices=choices,
        label=label_of(choices),
        seeds=tuple(taus),
        runs=tuple(run.directory.name for run in runs),
        steps=max(run.steps for run in runs),
        parameters=runs[0].parameters,
        tau_over_seeds=_by_seed(ratios),
        tau_over_prompts=_mean(ratios).estimates(),
        survival=_positions(runs, resamples, conditional=False),
        conditional=_positions(runs, resamples, conditional=True),
        curve=_mean_curve([run.curve for run in runs]),
        difference=difference,
        is_baseline=is_baseline,
        curve_difference=steps,
        marks=tuple(told),
    )


def _positions(runs: Sequence[TrainedRun], resamples: Resamples, *, conditional: bool) -> tuple[Estimate, ...]:
    ratios = []
    for run in runs:
        counts = run.counts
        below = counts.reached if conditional else np.broadcast_to(counts.rounds[:, None], counts.survived.shape)
        ratios.append(pooled_ratio(counts.survived, below, resamples))
    if len(ratios) == 1:
        return ratios[0].estimates()[MEAN]
    return tuple(over_seeds([ratio.value[-1, k] for ratio in ratios]) for k in range(runs[0].counts.num_slots))


def _mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Steps at which every seed was validated."""
    steps = sorted(set.intersection(*(set(curve[:, 0]) for curve in curves)))
    values = np.array([[dict(curve)[step] for curve in curves] for step in steps]).reshape(len(steps), len(curves))
    return np.column_stack([steps, values.mean(1), values.min(1), values.max(1)]) if steps else np.zeros((0, 4))
