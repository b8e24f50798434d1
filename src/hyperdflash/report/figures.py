"""Figures, drawn without a display and without pyplot's global state. ``acceptance_figure`` is the paper's Figure 1.

The paper does not say whether its per-position rates are survival or conditional: both are shown, side by side.
``label_lines`` writes each line's name beside its end instead of in a legend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hyperdflash.report.bootstrap import LEVEL, MEAN, Estimate
from hyperdflash.report.summary import Summary

# Okabe and Ito's palette: told apart with any common colour blindness; markers repeat the distinction in print
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS = (
    ("survival", "Survival: at least k drafts accepted"),
    ("conditional", "Conditional: slot k accepted, given all earlier ones"),
)
WIDTH_IN, PANEL_IN, DPI = 12.0, 3.7, 150


def acceptance_figure(summary: Summary, path: Path | str, title: str = "Per-position acceptance") -> Path:
    """Writes a PNG: a row a temperature, survival left and conditional right, a line a method, 95% intervals."""
    temperatures = summary.temperatures
    names = list(dict.fromkeys(m.name for m in summary.methods))  # a method keeps its colour in every row
    slots = max(m.num_slots for m in summary.methods)
    lines = _heading(summary)
    head = 0.5 + 0.2 * len(lines)  # inches
    figure = Figure(figsize=(WIDTH_IN, head + PANEL_IN * len(temperatures)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    parts = figure.subfigures(1 + len(temperatures), 1, height_ratios=[head] + [PANEL_IN] * len(temperatures))
    parts[0].text(0.012, 1 - 0.12 / head, title, fontsize=13, fontweight="bold", va="top")
    for i, line in enumerate(lines):
        parts[0].text(0.012, 1 - (0.42 + 0.2 * i) / head, line, fontsize=8.5, va="top", color="#333333")
    for part, temperature in zip(parts[1:], temperatures, strict=True):
        axes = part.subplots(1, 2, sharey=True)
        for axis, (metric, panel_title) in zip(axes, PANELS, strict=True):
            ends = []
            for method in summary.at(temperature):
                index = names.index(method.name)
                offset = 0.035 * (index - (len(names) - 1) / 2)  # error bars beside each other
                mean = method.groups[MEAN]
                _line(axis, getattr(mean, metric), index, offset)
                if end := _end(getattr(mean, metric), offset):
                    text = f"{method.name}: τ {mean.tau.value:.2f}" if metric == "survival" else method.name
                    ends.append((*end, text, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]))
            _dress(axis, f"{panel_title}  (T = {temperature:g})", slots)
            label_lines(axis, ends)
        axes[0].set_ylabel("acceptance rate")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def label_lines(axis: Axes, ends: Sequence[tuple], gap: float = 0.062) -> None:
    """Names lines to the right of ``axis``; ``ends`` are (x, y) of the last point, text, colour, marker.

    Labels lie at least ``gap`` of the axis's height apart, each with its marker and a thin line to its end. Call it after
    the limits are set.
    """
    to_fraction = axis.transData + axis.transAxes.inverted()
    ends = sorted(ends, key=lambda end: to_fraction.transform(end[:2])[1])
    heights = [to_fraction.transform(end[:2])[1] for end in ends]
    for (x, y, text, colour, marker), height in zip(ends, spread_labels(heights, gap), strict=True):
        axis.annotate(
            "",
            xy=(x, y),
            xytext=(1.035, height),
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "linestyle": ":", "shrinkA": 0, "shrinkB": 4},
        )
        axis.plot([1.035], [height], marker, color=colour, markersize=5, transform=axis.transAxes, clip_on=False)
        axis.text(1.06, height, text, transform=axis.transAxes, fontsize=8.5, va="center", color="#222222")


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending ``heights`` moved as little as keeps them ``gap`` apart and, where they fit, within 0..1."""
    placed: list[float] = []
    for height in heights:  # upwards, then back down from the top
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0.0))
    ceiling = max(1.0, gap * (len(heights) - 1))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _end(estimates: tuple[Estimate, ...], offset: float) -> tuple[float, float] | None:
    """The last point of a line that is defined."""
    defined = [(k + offset, e.value) for k, e in enumerate(estimates, start=1) if not np.isnan(e.value)]
    return defined[-1] if defined else None


def _line(axis: Axes, estimates: tuple[Estimate, ...], index: int, offset: float) -> None:
    slots = np.arange(1, len(estimates) + 1)
    value, low, high = np.array([(e.value, e.low, e.high) for e in estimates]).T
    # a percentile interval may lie to one side of the value; error bars take lengths
    below, above = np.maximum(value - low, 0), np.maximum(high - value, 0)
    axis.errorbar(
        slots + offset,
        value,
        yerr=np.stack([below, above]),
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle="-" if index < len(COLOURS) else "--",
        markersize=5,
        linewidth=1.6,
        elinewidth=0.8,
        capsize=1.8,
    )


def _dress(axis: Axes, title: str, slots: int) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("drafted position k")
    axis.set_xlim(0.7, slots + 0.3)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xticks(range(1, slots + 1))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.tick_params(labelleft=True)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _heading(summary: Summary) -> list[str]:
    """Prompt counts, and the runs the figure was made from."""
    counts = {}
    for temperature in summary.temperatures:
        groups = summary.at(temperature)[0].groups
        parts = ", ".join(f"{groups[g].prompts} {g}" for g in summary.groups[:-1])
        counts[temperature] = f"{groups[MEAN].prompts} prompts ({parts})"
    shared = len(set(counts.values())) == 1
    told = next(iter(counts.values())) if shared else "; ".join(f"T = {t:g}: {text}" for t, text in counts.items())
    lines = [f"{told}; plain mean over domains; bars: {LEVEL:.0%} bootstrap over prompts"]
    runs = list(dict.fromkeys(m.run_id for m in summary.methods if m.run_id))
    if runs:
        lines += textwrap.wrap("runs: " + ", ".join(runs), 150, break_on_hyphens=False)
    return lines
