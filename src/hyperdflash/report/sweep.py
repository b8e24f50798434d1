"""Summarizes a sweep's runs in the tidy record that its tables, figures and page show.

A cell is one choice of the axes on one target, with all its seeds. Two intervals stand beside its mean over seeds: over
seeds (Student's t, needs two) and over prompts (bootstrap, the same resampled prompts for all runs of a target). Differences to
the baseline are paired by seed and by prompt. A verdict requires two seeds, and both intervals to exclude 0.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hyperdflash.report.bootstrap import MEAN, Estimate, Ratio, Resamples, resample_prompts
from hyperdflash.report.measure import ratios
from hyperdflash.report.results import MINUS_BASELINE, Results, Row
from hyperdflash.report.sweep_runs import TrainedRun, marks

AHEAD, BEHIND, EVEN, NONE = "ahead", "behind", "cannot be told apart", "no verdict from one seed"
CURVE, LOSS = "validation tau", "training loss"  # by step; their intervals span the seeds
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 beyond
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Cell:
    """A choice of the axes on a target; ``label`` is its method in the record, ``seeds`` its runs by seed, ``base`` those of
    the cell that it is compared with, ``marks`` cautions, ``results`` its rows: their slot is a position, or a curve's step."""

    target: str
    label: str
    choices: dict[str, str]
    seeds: dict[int, TrainedRun]
    base: dict[int, TrainedRun]
    marks: tuple[str, ...] = ()
    results: Results = field(default_factory=lambda: Results(()))

    @property
    def is_baseline(self) -> bool:
        return self.base is self.seeds

    @property
    def shared(self) -> tuple[int, ...]:
        """Seeds in common with the baseline; empty for the baseline itself."""
        return () if self.is_baseline else tuple(seed for seed in self.seeds if seed in self.base)

    @property
    def over(self) -> str:
        """Unit of its interval: seeds, or prompts where there is one seed."""
        return "seeds" if len(self.seeds) > 1 else "prompts"

    @property
    def facts(self) -> dict[str, object]:
        runs = list(self.seeds.values())
        sizes = {"steps": max(run.steps for run in runs), "parameters": runs[0].parameters}
        return {**self.choices, "seeds": " ".join(map(str, self.seeds)), **sizes}

    def get(self, metric: str, group: str = MEAN, over: str = "") -> Estimate:
        """Returns the estimate over ``over``: by default over seeds, or over prompts where the cell has one seed."""
        return self.results.get(self.label, metric, group, None, over or self.over)

    def rates(self) -> dict[str, tuple[Estimate, ...]]:
        return self.results.rates(self.label, self.over)

    @property
    def verdict(self) -> str:
        """AHEAD or BEHIND only where both intervals exclude 0; one seed gives no verdict."""
        if len(self.shared) < 2:
            return NONE
        parts = [self.get(MINUS_BASELINE, over=over) for over in ("prompts", "seeds")]
        return AHEAD if all(e.low > 0 for e in parts) else BEHIND if all(e.high < 0 for e in parts) else EVEN


@dataclass(frozen=True)
class SweepReport:
    """``axes`` axis -> values in order; ``left_out`` run -> why; ``missing`` labels of jobs without a finished run, with the
    reason where it is known; ``prompts`` target -> how many validation prompts it has."""

    name: str
    axes: dict[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    results: Results
    baseline: str
    prompts: dict[str, int]
    left_out: dict[str, str]
    missing: tuple[str, ...]


def label_of(choices: dict[str, str]) -> str:
    """Names a choice: ``dflash · kl off``; a value that explains itself has no axis before it."""
    named = (v if k in ("method", "reducer", "conditioning", "run") else f"{k} {v}" for k, v in choices.items() if v != "")
    return " · ".join(named) or "the runs"


def summarize_sweep(
    name: str,
    axes: dict[str, tuple[str, ...]],
    members: Sequence[TrainedRun],
    baseline: dict[str, str],
    *,
    num_resamples: int = 2000,
    left_out: dict[str, str] | None = None,
    missing: Sequence[str] = (),
) -> SweepReport:
    """Compares ``members`` with ``baseline`` (axis -> value); ValueError where it has no run, or runs cannot be paired."""
    if not members:
        why = "".join(f"; {run} {reason}" for run, reason in list((left_out or {}).items())[:3])
        raise ValueError(
            f"no finished run of {name} to report: run its trainings first, by `python -m src.train` with the same words{why}"
        )
    axes = {axis: values for axis, values in axes.items() if axis not in ("seed", "target")}
    wanted = {axis: value for axis, value in baseline.items() if axis in axes}
    cautions = marks(members)
    cells: list[Cell] = []
    resamples: dict[str, Resamples] = {}
    for target in dict.fromkeys(run.target for run in members):
        here = sorted((run for run in members if run.target == target), key=lambda run: run.seed)
        _check_pairing(*here)
        resamples[target] = resample_prompts(here[0].domains, num_resamples)
        runs: dict[tuple, dict[int, TrainedRun]] = {}
        for run in here:
            runs.setdefault(tuple(run.choices[axis] for axis in axes), {})[run.seed] = run
        order = sorted(runs, key=lambda key: [axes[axis].index(value) for axis, value in zip(axes, key, strict=True)])
        # the baseline's values, and a cell's own on the axes that the baseline leaves open
        bases = {k: tuple(map(wanted.get, axes, k)) if wanted else order[0] for k in order}
        if not set(bases.values()) & set(order):
            have = ", ".join(label_of(dict(zip(axes, key, strict=True))) for key in order)
            none = f"the baseline {label_of(wanted)} has no finished run on {target}"
            raise ValueError(f"{none}: give baseline=AXIS=VALUE of {have}")
        for key in order:
            choices, seeds = dict(zip(axes, key, strict=True)), runs[key]
            own = tuple(f"seed {s}: {cautions[r.directory]}" for s, r in seeds.items() if r.directory in cautions)
            cell = Cell(target, label_of(choices), choices, seeds, runs.get(bases[key], {}), own)
            cells.append(replace(cell, results=Results(tuple(_rows(cell, resamples[target])))))
    groups = {draws.groups for draws in resamples.values()}
    if len(set(map(frozenset, groups))) > 1:
        raise ValueError(f"targets were validated on different domains: {' and '.join(map(str, groups))}")
    free = [axis for axis in axes if axis not in wanted]
    label = label_of(wanted) + (f" at the same {', '.join(free)}" if free else "")
    rows = tuple(row for cell in cells for row in cell.results.rows)
    results = Results(rows, {(cell.target, cell.label): cell.facts for cell in cells}, {"resamples": num_resamples})
    baseline = label if wanted else next(cell.label for cell in cells if cell.is_baseline)
    prompts = {target: sum(map(len, draws.members.values())) for target, draws in resamples.items()}
    return SweepReport(name, axes, tuple(cells), results, baseline, prompts, left_out or {}, tuple(missing))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Returns the mean and its 95% interval by Student's t, which is NaN for one seed."""
    values = np.asarray(values, np.float64)
    mean, freedom = float(values.mean()), len(values) - 1
    if not freedom:
        return Estimate(mean, math.nan, math.nan)
    t = T975[freedom - 1] if freedom <= len(T975) else 1.96
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def verdict_lines(report: SweepReport) -> list[str]:
    """Returns a sentence per choice: its verdict on every target, and whether the targets agree."""
    lines = []
    for label in dict.fromkeys(cell.label for cell in report.cells):
        verdicts = {c.target: c.verdict for c in report.cells if c.label == label and c.shared}
        if not verdicts:
            continue
        words, text = set(verdicts.values()), "; ".join(f"{v} on {t}" for t, v in verdicts.items())
        if len(report.prompts) == 1:
            text += ", the only target"
        elif len(verdicts) < len(report.prompts):
            text += "; not run on every target"
        elif len(words) > 1:
            text += ": targets do not agree"
        elif words <= {AHEAD, BEHIND}:
            text = f"{words.pop()}: agrees across targets ({', '.join(verdicts)})"
        lines.append(f"{label} against {report.baseline}: {text}")
    return lines


def _check_pairing(first: TrainedRun, *others: TrainedRun) -> None:
    for run in others:
        pair = f"{run.directory.name} and {first.directory.name}"
        if run.fingerprint != first.fingerprint:
            raise ValueError(
                f"{pair} were trained on different weights of {run.target}: remove the older and run its command again"
            )
        if (run.prompt_ids, run.domains, run.counts.num_slots) != (first.prompt_ids, first.domains, first.counts.num_slots):
            raise ValueError(f"{pair} were validated on different prompts or slots: remove the older and run its command again")


def _rows(cell: Cell, resamples: Resamples) -> Iterator[Row]:
    """Yields all rows of a cell: tau, acceptance per slot, the curve by step, and the differences to its baseline."""
    sizes = {group: len(members) for group, members in resamples.members.items()}
    sizes[MEAN] = sum(sizes.values())

    def row(group: str, metric: str, slot: int | None, e: Estimate, n: int, over: str) -> Row:
        return Row(cell.target, cell.label, "", 0.0, group, metric, slot, e.value, e.low, e.high, n, over)

    def estimates(metric: str, found: Sequence[Ratio]) -> Iterator[Row]:
        """Yields the mean over seeds twice: with its interval over seeds, and over prompts (the mean of each resample)."""
        mean = Ratio(resamples.groups, np.mean([r.value for r in found], axis=0), np.mean([r.resampled for r in found], axis=0))
        for i, (group, over_prompts) in enumerate(mean.estimates().items()):
            yield row(group, metric, None, over_seeds([r.value[i] for r in found]), sizes[group], "seeds")
            yield row(group, metric, None, over_prompts, sizes[group], "prompts")

    own = {seed: ratios(run.counts, resamples) for seed, run in cell.seeds.items()}
    curves = {seed: dict(run.curve) for seed, run in cell.seeds.items()}
    yield from estimates("tau", [found["tau"] for found in own.values()])
    for metric in ("survival", "conditional"):
        by_slot = next(iter(own.values()))[metric].estimates()[MEAN]
        if cell.over == "seeds":
            by_slot = [over_seeds([found[metric].value[-1, k] for found in own.values()]) for k in range(len(by_slot))]
        for slot, e in enumerate(by_slot, start=1):
            yield row(MEAN, metric, slot, e, sizes[MEAN], cell.over)
    for metric, found in {CURVE: curves, LOSS: {seed: dict(run.losses) for seed, run in cell.seeds.items()}}.items():
        for step in sorted(set.intersection(*map(set, found.values()))):  # at which every seed has a value
            values = np.array([curve[step] for curve in found.values()])
            spread = Estimate(float(values.mean()), float(values.min()), float(values.max()))
            yield row(MEAN, metric, int(step), spread, sizes[MEAN], "range of seeds")
    if cell.shared:
        base = {seed: ratios(cell.base[seed].counts, resamples) for seed in cell.shared}
        yield from estimates(MINUS_BASELINE, [own[seed]["tau"].minus(base[seed]["tau"]) for seed in cell.shared])
        others = {seed: dict(run.curve) for seed, run in cell.base.items()}
        for step in sorted(set.intersection(*map(set, [*curves.values(), *others.values()]))):
            difference = over_seeds([curves[seed][step] - others[seed][step] for seed in cell.shared])
            yield row(MEAN, f"{CURVE} minus baseline", int(step), difference, 0, "seeds")
