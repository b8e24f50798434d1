"""Draws the paper's Figure 1 and a sweep's figures, without a display or pyplot's global state. The paper does not state
whether its per-position rates are survival or conditional: ``acceptance_figure`` shows both."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hyperdflash.files import whole_file
from hyperdflash.report.bootstrap import LEVEL, MEAN, Estimate
from hyperdflash.report.results import Results
from hyperdflash.report.sweep import CURVE, LOSS, Cell, SweepReport, label_of

# Okabe and Ito's palette, distinct with any common color blindness; markers repeat the distinction in print
COLORS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS = {
    "survival": "Survival: at least k drafts accepted",
    "conditional": "Conditional: slot k accepted, given all earlier ones",
}
WIDTH_IN, PANEL_IN, COLUMN_IN, DPI = 12.0, 3.7, 5.6, 150


class Line(NamedTuple):
    """One method in a panel; ``index`` gives it the same look in every panel; ``rates``: metric -> an estimate per slot."""

    name: str
    index: int
    tau: float
    rates: dict[str, tuple[Estimate, ...]]


def acceptance_figure(
    panels: Sequence[tuple[str, Sequence[Line]]], path: Path | str, title: str, heading: Sequence[str] = ()
) -> Path:
    """Writes a PNG: a row per panel (its title and lines), survival left and conditional right, 95% intervals."""
    figure, parts = headed_figure(title, heading, [PANEL_IN] * len(panels))
    count = 1 + max(line.index for _, lines in panels for line in lines)
    for part, (name, lines) in zip(parts, panels, strict=True):
        axes = part.subplots(1, 2, sharey=True)
        part.suptitle(name, x=0.012, ha="left", fontsize=10, fontweight="bold")
        for axis, (metric, panel_title) in zip(axes, PANELS.items(), strict=True):
            for line in lines:
                estimates = line.rates[metric]
                x = np.arange(1, len(estimates) + 1) + 0.035 * (line.index - (count - 1) / 2)  # error bars beside each other
                error_bars(axis, x, estimates, line.index)
            dress(axis, panel_title, "drafted position k")
            axis.set(ylim=(-0.02, 1.02), ylabel="acceptance rate")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        label_lines(axes[1], [(0, line.tau, f"{line.name}: τ {line.tau:.2f}", *look(line.index)) for line in lines])
    return save_figure(figure, path)


def results_figure(found: Results, path: Path | str, title: str) -> Path:
    """Draws ``acceptance_figure`` with a panel per temperature and a line per method of ``found``."""
    methods, panels = found.distinct("method"), []
    for temperature in found.distinct("temperature"):
        here = found.at(temperature=temperature)
        lines = [Line(m, i, here.get(m, "tau").value, here.rates(m)) for i, m in enumerate(methods)]
        panels.append((f"T = {temperature:g}", lines))
    prompts = ", ".join(f"{here.count(methods[0], 'prompts', group)} {group}" for group in here.groups if group != MEAN)
    heading = [f"{prompts} prompts; plain mean over domains; bars: {LEVEL:.0%} bootstrap over prompts"]
    return acceptance_figure(panels, path, title, [*heading, *(["runs: " + ", ".join(found.runs)] if found.runs else [])])


def passes_figure(
    taus: dict[str, tuple[float, float]],
    speedups: dict[str, dict[str, Estimate]],
    path: Path,
    title: str,
    heading: Sequence[str],
) -> Path:
    """Writes a PNG: tau, then speedups, against sequential drafting passes. ``taus``: method -> passes and tau; ``speedups``:
    title of a panel -> method -> speedup, where it is known."""
    panels = [("Accepted length", "τ", {name: Estimate(tau, tau, tau) for name, (_, tau) in taus.items()})]
    panels += [(panel, "speed, times plain decoding", own) for panel, own in speedups.items()]
    figure, parts = headed_figure(title, heading, [PANEL_IN] * math.ceil(len(panels) / 2))
    axes = [axis for part in parts for axis in part.subplots(1, 2)]
    for axis, (panel, ylabel, own) in zip(axes, panels, strict=False):
        for index, (name, (passes, _)) in enumerate(taus.items()):
            if name in own:
                error_bars(axis, [passes + 0.07 * (index - (len(taus) - 1) / 2)], [own[name]], index)
        dress(axis, panel, "sequential drafting passes per round")
        axis.set(ylabel=ylabel, xlim=(0.5, 0.5 + max(passes for passes, _ in taus.values())))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.axhline(1, color="#8C8C8C", linewidth=0.8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[1::2]:
        label_lines(axis, [(0, tau, name, *look(i)) for i, (name, (_, tau)) in enumerate(taus.items())])
    return save_figure(figure, path)


def sweep_figures(report: SweepReport, folder: Path) -> list[Path]:
    """Writes acceptance.png, tau_by_axis.png and curves.png."""
    axis = next(iter(report.axes), None)
    panels = [
        (name, [Line(c.choices.get(axis, c.label), _index(report, axis, c), c.get("tau").value, c.rates()) for c in cells])
        for name, cells in _facets(report.cells, axis)
    ]
    counts = sorted({len(cell.seeds) for cell in report.cells})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    more = ", over prompts where there is one seed" if 1 in counts else ""
    over = f"over seeds{more}" if counts != [1] else "over prompts"
    heading = f"{'one seed' if counts == [1] else f'{seeds} seeds'}; bars: {LEVEL:.0%} {over}"
    title = f"Per-position acceptance, sweep {report.name}"
    written = [acceptance_figure(panels, folder / "acceptance.png", title, [heading])]
    written.append(_by_axis(report, folder / "tau_by_axis.png", heading))
    return [*written, _by_step(report, folder / "curves.png", axis)]


def _by_step(report: SweepReport, path: Path, axis: str | None) -> Path:
    """Draws training loss and validation tau by step: a row per facet of ``acceptance_figure``, with the same looks."""
    facets = _facets(report.cells, axis)
    heading = "a step that every seed has; mean over seeds"
    figure, parts = headed_figure(f"Training, sweep {report.name}", [heading], [PANEL_IN] * len(facets))
    for part, (name, cells) in zip(parts, facets, strict=True):
        part.suptitle(name, x=0.012, ha="left", fontsize=10, fontweight="bold")
        panels, ends = part.subplots(1, 2), []
        for panel, metric in zip(panels, (LOSS, CURVE), strict=True):
            for cell in cells:
                rows, (color, marker) = cell.results.at(metric=metric).rows, look(_index(report, axis, cell))
                steps, values = [row.slot for row in rows], [row.value for row in rows]
                panel.plot(steps, values, color=color, marker=marker if len(rows) < 40 else "", markersize=4)
                ends += [(0, cell.get("tau").value, cell.choices.get(axis, cell.label), color, marker)] * (metric == CURVE)
            dress(panel, metric, "optimizer step")
        label_lines(panels[1], ends)
    return save_figure(figure, path)


def _by_axis(report: SweepReport, path: Path, heading: str) -> Path:
    """Draws tau over an axis's values: a row per target, a panel per axis, a line per choice of the other axes."""
    names = list(report.axes) or [None]
    title, width = f"Accepted length by axis, sweep {report.name}", COLUMN_IN * len(names) + 1.2
    figure, parts = headed_figure(title, [heading], [PANEL_IN] * len(report.prompts), width)
    for target, part in zip(report.prompts, parts, strict=True):
        for panel, name in zip(part.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            values = report.axes[name] if name else ("",)
            numeric = all(value.replace(".", "", 1).isdigit() for value in values)
            others, ends = _facets([cell for cell in report.cells if cell.target == target], name), []
            for index, (choice, cells) in enumerate(others):
                shift = min(0.1, 0.5 / len(others)) * (index - (len(others) - 1) / 2)  # error bars beside each other
                estimates = [cell.get("tau") for cell in cells]
                error_bars(panel, [_index(report, name, c) + shift for c in cells], estimates, index, joined=numeric)
                ends.append((0, estimates[-1].value, choice.removeprefix(f"target {target} · "), *look(index)))
            dress(panel, f"target {target}", name or "")
            panel.set_xticks(range(len(values)), [value or "(none)" for value in values], rotation=28, ha="right", fontsize=8)
            panel.set_ylabel("τ, plain mean over domains")
            if 1 < len(others) <= 10:
                label_lines(panel, ends)
    return save_figure(figure, path)


def _facets(cells: Sequence[Cell], axis: str | None) -> list[tuple[str, list[Cell]]]:
    """Groups cells that differ in ``axis`` alone: (title, cells); a title names the target and the other axes."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        others = {name: value for name, value in cell.choices.items() if value and name != axis}
        found.setdefault(" · ".join([f"target {cell.target}", *([label_of(others)] if others else [])]), []).append(cell)
    return list(found.items())


def _index(report: SweepReport, axis: str | None, cell: Cell) -> int:
    return report.axes[axis].index(cell.choices[axis]) if axis else 0


def headed_figure(
    title: str, lines: Sequence[str], heights: Sequence[float], width: float = WIDTH_IN
) -> tuple[Figure, list[SubFigure]]:
    """Returns a figure with a title and ``lines`` of small text, and a part per height in inches."""
    lines = [line for text in lines for line in textwrap.wrap(text, 150, break_on_hyphens=False)]
    head = 0.5 + 0.2 * len(lines)
    figure = Figure(figsize=(width, head + sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    top, *parts = figure.subfigures(1 + len(heights), 1, height_ratios=[head, *heights])
    top.text(0.012, 1 - 0.12 / head, title, fontsize=13, fontweight="bold", va="top")
    for i, line in enumerate(lines):
        top.text(0.012, 1 - (0.42 + 0.2 * i) / head, line, fontsize=8.5, va="top", color="#333333")
    return figure, parts


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Writes a PNG; ``path`` is complete or absent."""
    with whole_file(Path(path)) as file:
        figure.savefig(file, dpi=DPI, format="png")
    return Path(path)


def look(index: int) -> tuple[str, str]:
    """Returns color and marker; beyond the palette colors repeat with other markers."""
    return COLORS[index % len(COLORS)], MARKERS[(index + 3 * (index // len(COLORS))) % len(MARKERS)]


def error_bars(axis: Axes, x: Sequence[float], estimates: Sequence[Estimate], index: int, joined: bool = True) -> None:
    """Draws values with their intervals, without those that are undefined."""
    color, marker = look(index)
    value, low, high = np.array([(e.value, e.low, e.high) for e in estimates]).T
    # a percentile interval may lie to one side of the value; error bars take lengths
    reach = np.nan_to_num(np.stack([np.maximum(value - low, 0), np.maximum(high - value, 0)]))
    style = ("-" if index < len(COLORS) else "--") if joined else "none"
    bars = {"markersize": 5, "linewidth": 1.6, "elinewidth": 0.8, "capsize": 1.8}
    axis.errorbar(x, value, yerr=reach, color=color, marker=marker, linestyle=style, **bars)


def dress(axis: Axes, title: str, xlabel: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def label_lines(axis: Axes, ends: Sequence[tuple]) -> None:
    """Names lines to the right of ``axis``, the highest first; ``ends``: x, y, text, color, marker of a line's last point."""
    highest = sorted(ends, key=lambda end: -end[1])
    handles = [Line2D([], [], color=color, marker=marker, markersize=5, label=text) for _, _, text, color, marker in highest]
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
