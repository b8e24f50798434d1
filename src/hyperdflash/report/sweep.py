"""Summarizes a sweep's runs in the tidy record that its tables, figures and page show.

A cell is one choice of the axes on one target, with all its seeds. Two intervals stand beside its mean over seeds: over
seeds (Student's t, needs two) and over prompts (bootstrap, the same resampled prompts for all runs of a target). Differences to
the baseline are paired by seed and by prompt. A verdict requires both intervals to exclude 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hyperdflash.report.bootstrap import MEAN, Estimate, Ratio, Resamples, resample_prompts
from hyperdflash.report.measure import ratios
from hyperdflash.report.results import MINUS_BASELINE, Results, Row
from hyperdflash.report.sweep_runs import Member, TrainedRun, marks

AHEAD, BEHIND, EVEN = "ahead", "behind", "cannot be told apart"
ALONE = "one seed"
CURVE = "validation tau"  # by step; its interval spans the seeds
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 beyond
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Cell:
    """A choice of the axes on a target; ``label`` is its method in the record, ``shared`` the seeds it has in common with the
    baseline."""

    target: str
    label: str
    choices: dict[str, str]
    seeds: tuple[int, ...]
    shared: tuple[int, ...]
    runs: tuple[str, ...]
    steps: int
    parameters: int
    is_baseline: bool
    marks: tuple[str, ...] = ()

    @property
    def over(self) -> str:
        """Unit of its interval: seeds, or prompts where there is one seed."""
        return "seeds" if len(self.seeds) > 1 else "prompts"


@dataclass(frozen=True)
class SweepReport:
    """``axes`` axis -> values in order; ``groups`` the domains, then MEAN; ``left_out`` run -> why; ``missing`` labels of jobs
    without a finished run, with the reason where it is known; ``prompts`` target -> how many validation prompts it has.

    Rows of ``results`` have the slot of a position, or the step of a curve.
    """

    name: str
    axes: dict[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    results: Results
    groups: tuple[str, ...]
    baseline: str
    num_resamples: int
    prompts: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.prompts)

    @cached_property
    def of_target(self) -> dict[str, Results]:
        return {target: self.results.at(target=target) for target in self.targets}

    def at(self, target: str) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.target == target)

    def get(self, cell: Cell, metric: str, group: str = MEAN, slot: int | None = None, over: str = "") -> Estimate:
        """Returns the estimate over ``over``: by default over seeds, or over prompts where the cell has one seed."""
        return self.of_target[cell.target].get(cell.label, metric, group, slot, over or cell.over)

    def curve(self, cell: Cell, metric: str = CURVE) -> list[Row]:
        """Returns the curve's rows by step."""
        return [row for row in self.of_target[cell.target].rows if (row.method, row.metric) == (cell.label, metric)]

    def verdict(self, cell: Cell) -> str:
        """Returns AHEAD or BEHIND only where both intervals exclude 0; with one seed the prompts' interval decides."""
        alone = len(cell.shared) < 2
        parts = [self.get(cell, MINUS_BASELINE, over=over) for over in (("prompts",) if alone else ("prompts", "seeds"))]
        word = AHEAD if all(e.low > 0 for e in parts) else BEHIND if all(e.high < 0 for e in parts) else EVEN
        return f"{word} ({ALONE})" if alone else word


def label_of(choices: dict[str, str]) -> str:
    """Names a choice: ``dflash · kl off``; a value that explains itself has no axis before it."""
    named = (v if k in ("method", "reducer", "conditioning", "run") else f"{k} {v}" for k, v in choices.items() if v != "")
    return " · ".join(named) or "the runs"


def summarize_sweep(
    name: str,
    axes: dict[str, tuple[str, ...]],
    members: Sequence[Member],
    baseline: dict[str, str],
    *,
    num_resamples: int = 2000,
    left_out: dict[str, str] | None = None,
    missing: Sequence[str] = (),
) -> SweepReport:
    """Compares ``members`` with ``baseline`` (axis -> value); ValueError where it has no run, or runs cannot be paired."""
    if not members:
        why = "".join(f"; {run} {reason}" for run, reason in list((left_out or {}).items())[:3])
        raise ValueError(f"no finished run of {name} to report: run `python -m src.train -m sweep={name}` first{why}")
    axes = {axis: values for axis, values in axes.items() if axis not in ("seed", "target")}
    wanted = {axis: value for axis, value in baseline.items() if axis in axes}
    reservations = marks(members)
    cells: list[Cell] = []
    rows: list[Row] = []
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
        measured = {key: _by_seed(together[key], resamples) for key in order}
        # the baseline's values, and a cell's own on the axes that the baseline leaves open
        bases = {
            key: tuple(wanted.get(axis, value) for axis, value in zip(axes, key, strict=True)) if wanted else order[0]
            for key in order
        }
        if not set(bases.values()) & set(order):
            have = ", ".join(label_of(dict(zip(axes, key, strict=True))) for key in order)
            raise ValueError(
                f"the baseline {label_of(wanted)} has no finished run on {target}: give baseline=AXIS=VALUE of {have}"
            )
        for key in order:
            choices, runs, base = dict(zip(axes, key, strict=True)), together[key], bases[key]
            compared = key != base and base in measured
            shared = tuple(seed for seed in measured[key] if seed in measured[base]) if compared else ()
            own = [run for _, run in sorted(runs.items())]
            cell = Cell(
                target=target,
                label=label_of(choices),
                choices=choices,
                seeds=tuple(sorted(runs)),
                shared=shared,
                runs=tuple(run.directory.name for run in own),
                steps=max(run.steps for run in own),
                parameters=own[0].parameters,
                is_baseline=key == base,
                marks=tuple(f"seed {r.seed}: {reservations[r.directory]}" for r in own if r.directory in reservations),
            )
            cells.append(cell)
            rows += _rows(cell, measured[key], first.domains)
            rows += _curve(cell, own)
            if shared:
                pairs = [measured[key][seed]["tau"].minus(measured[base][seed]["tau"]) for seed in shared]
                rows += _estimates(cell, MINUS_BASELINE, pairs, first.domains)
                rows += _curve_difference(cell, runs, together[base])
    free = [axis for axis in axes if wanted and axis not in wanted]
    label = label_of(wanted) + (f" at the same {', '.join(free)}" if free else "")
    label = label if wanted else next(cell.label for cell in cells if cell.is_baseline)
    details = {
        (c.target, c.label): {**c.choices, "seeds": " ".join(map(str, c.seeds)), "steps": c.steps, "parameters": c.parameters}
        for c in cells
    }
    results = Results(tuple(rows), details)
    return SweepReport(name, axes, tuple(cells), results, groups, label, num_resamples, prompts, left_out, tuple(missing))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Returns the mean and its 95% interval by Student's t, which is NaN for one seed."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    t = T975[len(values) - 2] if len(values) - 2 < len(T975) else 1.96
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def verdict_lines(report: SweepReport) -> list[str]:
    """Returns a sentence per choice: its verdict on every target, and whether the targets agree."""
    lines = []
    for label in dict.fromkeys(cell.label for cell in report.cells):
        verdicts = {c.target: report.verdict(c) for c in report.cells if c.label == label and c.shared}
        if not verdicts:
            continue
        words, each = set(verdicts.values()), "; ".join(f"{v} on {t}" for t, v in verdicts.items())
        if len(report.targets) == 1:
            text = f"{words.pop()} on {report.targets[0]}, the only target"
        elif len(verdicts) < len(report.targets):
            text = f"{each}; not run on every target"
        elif len(words) == 1 and words <= {AHEAD, BEHIND}:
            text = f"{words.pop()}: agrees across targets ({', '.join(verdicts)})"
        elif len(words) == 1:
            word = words.pop()
            text = f"{word} on {'any' if word == EVEN else 'each'} of {', '.join(verdicts)}"
        else:
            text = f"{each}: targets do not agree"
        lines.append(f"{label} against {report.baseline}: {text}")
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


def _by_seed(runs: dict[int, TrainedRun], resamples: Resamples) -> dict[int, dict[str, Ratio]]:
    """Returns seed -> metric -> ratio."""
    return {seed: ratios(run.sample, resamples) for seed, run in sorted(runs.items())}


def _rows(cell: Cell, runs: dict[int, dict[str, Ratio]], domains: Sequence[str]) -> Iterator[Row]:
    """Yields tau per group over seeds and over prompts, then survival and conditional per slot of MEAN."""
    found = list(runs.values())
    yield from _estimates(cell, "tau", [own["tau"] for own in found], domains)
    for metric in ("survival", "conditional"):
        by_slot = found[0][metric].estimates()[MEAN]
        if cell.over == "seeds":
            by_slot = [over_seeds([own[metric].value[-1, k] for own in found]) for k in range(len(by_slot))]
        for slot, e in enumerate(by_slot, start=1):
            yield _row(cell, MEAN, metric, slot, e, len(domains), cell.over)


def _estimates(cell: Cell, metric: str, runs: Sequence[Ratio], domains: Sequence[str]) -> Iterator[Row]:
    """Yields the mean over seeds twice: with its interval over seeds, and over prompts (the mean of each resample)."""
    mean = Ratio(runs[0].groups, np.mean([r.value for r in runs], axis=0), np.mean([r.resampled for r in runs], axis=0))
    over_prompts = mean.estimates()
    for i, group in enumerate(mean.groups):
        size = len(domains) if group == MEAN else list(domains).count(group)
        yield _row(cell, group, metric, None, over_seeds([r.value[i] for r in runs]), size, "seeds")
        yield _row(cell, group, metric, None, over_prompts[group], size, "prompts")


def _curve(cell: Cell, runs: Sequence[TrainedRun]) -> Iterator[Row]:
    """Yields mean, lowest and highest seed at steps where every seed was validated."""
    curves = [dict(run.curve) for run in runs]
    for step in sorted(set.intersection(*map(set, curves))):
        values = np.array([curve[step] for curve in curves])
        estimate = Estimate(float(values.mean()), float(values.min()), float(values.max()))
        yield _row(cell, MEAN, CURVE, int(step), estimate, len(runs[0].domains), "range of seeds")


def _curve_difference(cell: Cell, own: dict[int, TrainedRun], base: dict[int, TrainedRun]) -> Iterator[Row]:
    """Yields differences paired by seed, at steps where every seed of both cells was validated."""
    curves = [{seed: dict(run.curve) for seed, run in runs.items()} for runs in (own, base)]
    steps = set.intersection(*(set(curve) for runs in curves for curve in runs.values()))
    for step in sorted(steps):
        estimate = over_seeds([curves[0][seed][step] - curves[1][seed][step] for seed in cell.shared])
        yield _row(cell, MEAN, f"{CURVE} minus baseline", int(step), estimate, 0, "seeds")


def _row(cell: Cell, group: str, metric: str, slot: int | None, e: Estimate, n: int, over: str) -> Row:
    return Row(cell.target, cell.label, "", 0.0, group, metric, slot, e.value, e.low, e.high, n, over)


def _doubled(run: TrainedRun, kept: TrainedRun) -> str:
    names = [name for name in run.decided if run.decided[name] != kept.decided.get(name)]
    return (
        f"has the choices, seed and target of {kept.directory.name}, which is reported; they differ in "
        f"{', '.join(names) or 'nothing that decides a run'}: report them apart with runs="
    )
