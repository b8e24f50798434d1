"""Figures of a SweepReport: acceptance per position, tau against each axis, tau against step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hyperdflash.report.bootstrap import LEVEL, MEAN
from hyperdflash.report.figures import COLOURS, DPI, MARKERS, PANELS, label_lines
from hyperdflash.report.sweep import Cell, SweepReport

PANEL_IN = (5.6, 3.6)


def sweep_figures(report: SweepReport, folder: Path) -> list[Path]:
    """Writes acceptance.png, tau_by_axis.png and, where runs were validated more than once, tau_by_step.png."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [acceptance_figure(report, folder / "acceptance.png"), axis_figure(report, folder / "tau_by_axis.png")]
    if any(len(cell.curve) > 1 for cell in report.cells):
        written.append(step_figure(report, folder / "tau_by_step.png"))
    return written


def acceptance_figure(report: SweepReport, path: Path) -> Path:
    """A row a target and choice of the other axes, survival and conditional side by side, a line a value of the first axis."""
    line_axis = next(iter(report.axes), None)
    rows = _facets(report, line_axis)
    figure, axes = _panels(report, "Per-position acceptance", len(rows), 2, "bars")
    for (title, cells), pair in zip(rows, axes, strict=True):
        for axis, (metric, panel_title) in zip(pair, PANELS, strict=True):
            ends = []
            for cell in cells:
                index = _index(report, line_axis, cell)
                offset = 0.03 * (index - (len(_values(report, line_axis)) - 1) / 2)
                estimates = getattr(cell, metric)
                x = np.arange(1, len(estimates) + 1) + offset
                _bars(axis, x, estimates, index)
                defined = [(px, e.value) for px, e in zip(x, estimates, strict=True) if not math.isnan(e.value)]
                if defined:
                    name = cell.choices.get(line_axis, cell.label)
                    text = f"{name}: τ {cell.tau_over_seeds[MEAN].value:.2f}" if metric == "survival" else name
                    ends.append((*defined[-1], text, *_look(index)))
            _dress(axis, f"{panel_title}\n{title}", "drafted position k")
            axis.set_xlim(0.6, report.num_slots + 0.4)
            axis.set_xticks(range(1, report.num_slots + 1))
            axis.set_ylim(-0.02, 1.02)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            label_lines(axis, ends)
        pair[0].set_ylabel("acceptance rate")
    return _save(figure, path)


def axis_figure(report: SweepReport, path: Path) -> Path:
    """A row a target, a panel an axis: tau over the axis's values, a line a choice of the other axes."""
    names = list(report.axes) or [None]
    figure, axes = _panels(report, "Accepted length by axis", len(report.targets), len(names), "bars")
    for target, row in zip(report.targets, axes, strict=True):
        for panel, name in zip(row, names, strict=True):
            values = _values(report, name)
            numbers = _numbers(values)
            spots = numbers if numbers is not None else list(range(len(values)))
            others = _facets(report, name, among=report.at(target), by_row=False)
            ends = []
            for index, (title, cells) in enumerate(others):
                x = np.array([spots[_index(report, name, cell)] for cell in cells], dtype=float)
                span = (max(spots) - min(spots)) or 1
                x = x + (0.012 * span if numbers is not None else min(0.1, 0.5 / len(others))) * (index - (len(others) - 1) / 2)
                estimates = [_whole(cell) for cell in cells]
                _bars(panel, x, estimates, index, joined=numbers is not None)
                ends.append((x[-1], estimates[-1].value, title, *_look(index)))
            _dress(panel, f"target {target}", name or "")
            turn = 0 if numbers is not None else 28 if len(values) <= 9 else 65  # degrees
            panel.set_xticks(spots, [value or "(none)" for value in values], rotation=turn, ha="right" if turn else "center")
            panel.tick_params(axis="x", labelsize=8 if turn else 9)
            panel.set_ylabel("τ, plain mean over domains")
            if len(others) > 1 and len(others) <= 10:
                label_lines(panel, ends)
    return _save(figure, path)


def step_figure(report: SweepReport, path: Path) -> Path:
    """A panel a target and choice of the other axes, a line a value of the last axis; the band spans the seeds."""
    line_axis = list(report.axes)[-1] if report.axes else None
    rows = _facets(report, line_axis)
    columns = min(3, len(rows))
    figure, axes = _panels(report, "Validation tau by step", -(-len(rows) // columns), columns, "band: lowest to highest seed")
    flat = [axis for row in axes for axis in row]
    for axis, (title, cells) in zip(flat, rows, strict=False):
        ends = []
        for cell in cells:
            if not len(cell.curve):
                continue
            index = _index(report, line_axis, cell)
            colour, marker = _look(index)
            step, mean, low, high = cell.curve.T
            axis.plot(step, mean, color=colour, marker=marker, markersize=4, linewidth=1.6)
            axis.fill_between(step, low, high, color=colour, alpha=0.15, linewidth=0)
            ends.append((step[-1], mean[-1], cell.choices.get(line_axis, cell.label), colour, marker))
        _dress(axis, title, "optimizer step")
        axis.set_ylabel("validation τ, pooled")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(ends) > 1:
            label_lines(axis, ends)
    for axis in flat[len(rows) :]:
        axis.set_visible(False)
    return _save(figure, path)


def _facets(
    report: SweepReport, line_axis: str | None, among: Sequence[Cell] | None = None, by_row: bool = True
) -> list[tuple[str, list[Cell]]]:
    """Cells that differ in ``line_axis`` alone -> (title, cells); titles name the other axes, and the target ``by_row``."""
    found: dict[tuple, list[Cell]] = {}
    for cell in report.cells if among is None else among:
        rest = tuple((axis, value) for axis, value in cell.choices.items() if axis != line_axis)
        found.setdefault((cell.target, rest), []).append(cell)
    titles = []
    for (target, rest), cells in found.items():
        others = " · ".join(value if axis in ("variant", "run") else f"{axis} {value}" for axis, value in rest if value)
        titles.append((" · ".join(part for part in (f"target {target}" if by_row else "", others) if part), cells))
    return titles


def _values(report: SweepReport, axis: str | None) -> tuple[str, ...]:
    return report.axes[axis] if axis else ("",)


def _index(report: SweepReport, axis: str | None, cell: Cell) -> int:
    return _values(report, axis).index(cell.choices[axis]) if axis else 0


def _numbers(values: Sequence[str]) -> list[float] | None:
    """Positions on a numeric scale, where all values are numbers."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def _look(index: int) -> tuple[str, str]:
    turn = index // len(COLOURS)  # beyond the palette a colour comes again with another marker
    return COLOURS[index % len(COLOURS)], MARKERS[(index + 3 * turn) % len(MARKERS)]


def _whole(cell: Cell):
    """tau's plain mean with the interval over seeds, or over prompts where there is one seed."""
    return (cell.tau_over_seeds if len(cell.seeds) > 1 else cell.tau_over_prompts)[MEAN]


def _bars(axis: Axes, x: np.ndarray, estimates: Sequence, index: int, joined: bool = True) -> None:
    colour, marker = _look(index)
    value, low, high = np.array([(e.value, e.low, e.high) for e in estimates]).T
    reach = np.nan_to_num(np.stack([np.maximum(value - low, 0), np.maximum(high - value, 0)]))
    style = ("-" if index < len(COLOURS) else "--") if joined else "none"
    axis.errorbar(x, value, yerr=reach, color=colour, marker=marker, linestyle=style, markersize=5, elinewidth=0.8, capsize=1.8)


def _panels(report: SweepReport, title: str, rows: int, columns: int, what: str) -> tuple[Figure, np.ndarray]:
    seeds = sorted({len(cell.seeds) for cell in report.cells})
    over = f"{LEVEL:.0%} over seeds" if seeds[0] > 1 else f"{LEVEL:.0%} over seeds, over prompts where there is one seed"
    told = f"{what}: {over}" if what == "bars" else what
    counts = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    figure = Figure(figsize=(PANEL_IN[0] * columns + 1.2, PANEL_IN[1] * rows + 0.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.1)
    line = "\n" if columns == 1 else " · "
    named = f"{title} · sweep {report.name}{line}{counts} · {told}"
    figure.suptitle(named, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _dress(axis: Axes, title: str, xlabel: str) -> None:
    axis.set_title(title, fontsize=9.5)
    axis.set_xlabel(xlabel)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=DPI)
    partial.replace(path)
    return path
