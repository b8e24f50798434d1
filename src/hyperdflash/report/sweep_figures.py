"""Draws a SweepReport: acceptance per position, tau against each axis, tau against step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hyperdflash.report.bootstrap import LEVEL
from hyperdflash.report.figures import (
    PANEL_IN,
    Line,
    acceptance_figure,
    dress,
    error_bars,
    headed_figure,
    label_lines,
    look,
    save_figure,
)
from hyperdflash.report.sweep import Cell, SweepReport

COLUMN_IN = 5.6


def sweep_figures(report: SweepReport, folder: Path) -> list[Path]:
    """Writes acceptance.png, tau_by_axis.png and, where runs were validated more than once, tau_by_step.png."""
    first = next(iter(report.axes), None)
    panels = [
        (title, [_line(report, cell, _index(report, first, cell), cell.choices.get(first, cell.label)) for cell in cells])
        for title, cells in _facets(report.cells, first)
    ]
    title = f"Per-position acceptance, sweep {report.name}"
    written = [acceptance_figure(panels, folder / "acceptance.png", title, [_heading(report)])]
    written.append(_by_axis(report, folder / "tau_by_axis.png"))
    if any(len(report.curve(cell)) > 1 for cell in report.cells):
        written.append(_by_step(report, folder / "tau_by_step.png"))
    return written


def _line(report: SweepReport, cell: Cell, index: int, name: str) -> Line:
    here = report.of_target[cell.target]
    rates = (here.slots(cell.label, metric, cell.over) for metric in ("survival", "conditional"))
    return Line(name, index, report.get(cell, "tau").value, *rates)


def _by_axis(report: SweepReport, path: Path) -> Path:
    """Draws tau over an axis's values: a row per target, a panel per axis, a line per choice of the other axes."""
    names = list(report.axes) or [None]
    title, width = f"Accepted length by axis, sweep {report.name}", COLUMN_IN * len(names) + 1.2
    figure, parts = headed_figure(title, [_heading(report)], [PANEL_IN] * len(report.targets), width)
    for target, part in zip(report.targets, parts, strict=True):
        for panel, name in zip(part.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            values = report.axes[name] if name else ("",)
            numbers = _numbers(values)
            spots = numbers or list(range(len(values)))
            others = _facets(report.at(target), name)
            step = 0.012 * ((max(spots) - min(spots)) or 1) if numbers else min(0.1, 0.5 / len(others))
            ends = []
            for index, (choice, cells) in enumerate(others):
                x = np.array([spots[_index(report, name, c)] for c in cells]) + step * (index - (len(others) - 1) / 2)
                estimates = [report.get(cell, "tau") for cell in cells]
                error_bars(panel, x, estimates, index, joined=bool(numbers))
                ends.append((x[-1], estimates[-1].value, choice.removeprefix(f"target {target} · "), *look(index)))
            dress(panel, f"target {target}", name or "")
            turn = 0 if numbers else 28 if len(values) <= 9 else 65  # degrees
            panel.set_xticks(spots, [value or "(none)" for value in values], rotation=turn, ha="right" if turn else "center")
            panel.tick_params(axis="x", labelsize=8 if turn else 9)
            panel.set_ylabel("τ, plain mean over domains")
            if 1 < len(others) <= 10:
                label_lines(panel, ends)
    return save_figure(figure, path)


def _by_step(report: SweepReport, path: Path) -> Path:
    """Draws a panel per target and choice of the other axes, a line per value of the last axis with a band over seeds."""
    axis = list(report.axes)[-1] if report.axes else None
    facets = _facets(report.cells, axis)
    columns = min(3, len(facets))
    heading = f"{_seeds(report)}; band: lowest to highest seed"
    rows = [facets[i : i + columns] for i in range(0, len(facets), columns)]
    width = COLUMN_IN * columns + 1.2
    title = f"Validation tau by step, sweep {report.name}"
    figure, parts = headed_figure(title, [heading], [PANEL_IN] * len(rows), width)
    for part, row in zip(parts, rows, strict=True):
        panels = part.subplots(1, columns, squeeze=False)[0]
        for panel, (name, cells) in zip(panels, row, strict=False):
            _curves(panel, report, axis, cells)
            dress(panel, name, "optimizer step")
            panel.set_ylabel("validation τ, pooled")
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for panel in panels[len(row) :]:
            panel.set_visible(False)
    return save_figure(figure, path)


def _curves(panel: Axes, report: SweepReport, axis: str | None, cells: Sequence[Cell]) -> None:
    ends = []
    for cell in cells:
        if curve := report.curve(cell):
            color, marker = look(_index(report, axis, cell))
            step, mean, low, high = np.array([(r.slot, r.value, r.low, r.high) for r in curve]).T
            panel.plot(step, mean, color=color, marker=marker, markersize=4, linewidth=1.6)
            panel.fill_between(step, low, high, color=color, alpha=0.15, linewidth=0)
            ends.append((step[-1], mean[-1], cell.choices.get(axis, cell.label), color, marker))
    if len(ends) > 1:
        label_lines(panel, ends)


def _facets(cells: Sequence[Cell], axis: str | None) -> list[tuple[str, list[Cell]]]:
    """Groups cells that differ in ``axis`` alone: (title, cells); a title names the target and the other axes."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        others = {name: value for name, value in cell.choices.items() if value and name != axis}
        rest = [value if name in ("method", "run") else f"{name} {value}" for name, value in others.items()]
        found.setdefault(" · ".join([f"target {cell.target}", *rest]), []).append(cell)
    return list(found.items())


def _index(report: SweepReport, axis: str | None, cell: Cell) -> int:
    return report.axes[axis].index(cell.choices[axis]) if axis else 0


def _numbers(values: Sequence[str]) -> list[float] | None:
    """Returns ``values`` as numbers; None where one is no number."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def _seeds(report: SweepReport) -> str:
    seeds = sorted({len(cell.seeds) for cell in report.cells})
    return f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"


def _heading(report: SweepReport) -> str:
    over = ", over prompts where there is one seed" if any(len(cell.seeds) == 1 for cell in report.cells) else ""
    return f"{_seeds(report)}; bars: {LEVEL:.0%} over seeds{over}"
