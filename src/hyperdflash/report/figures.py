"""Draws the paper's Figure 1, and offers what all figures share, without a display or pyplot's global state.

The paper does not state whether its per-position rates are survival or conditional: ``acceptance_figure`` shows both.
``label_lines`` writes each line's name beside its end instead of in a legend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter

from hyperdflash.report.bootstrap import LEVEL, MEAN, Estimate
from hyperdflash.report.results import Results

# Okabe and Ito's palette, distinct with any common color blindness; markers repeat the distinction in print
COLORS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS = (
    ("survival", "Survival: at least k drafts accepted"),
    ("conditional", "Conditional: slot k accepted, given all earlier ones"),
)
WIDTH_IN, PANEL_IN, DPI = 12.0, 3.7, 150


@dataclass(frozen=True)
class Line:
    """One method in a panel; ``index`` gives it the same look in every panel."""

    name: str
    index: int
    tau: float
    survival: tuple[Estimate, ...]
    conditional: tuple[Estimate, ...]


def acceptance_figure(
    panels: Sequence[tuple[str, Sequence[Line]]], path: Path | str, title: str, heading: Sequence[str] = ()
) -> Path:
    """Writes a PNG: a row per panel (its title and lines), survival left and conditional right, 95% intervals."""
    figure, parts = headed_figure(title, [line for text in heading for line in _wrapped(text)], [PANEL_IN] * len(panels))
    everything = [line for _, lines in panels for line in lines]
    count, slots = 1 + max(line.index for line in everything), max(len(line.survival) for line in everything)
    for part, (name, lines) in zip(parts, panels, strict=True):
        axes = part.subplots(1, 2, sharey=True)
        for axis, (metric, panel_title) in zip(axes, PANELS, strict=True):
            ends = []
            for line in lines:
                estimates = getattr(line, metric)
                x = np.arange(1, len(estimates) + 1) + 0.035 * (line.index - (count - 1) / 2)  # error bars beside each other
                error_bars(axis, x, estimates, line.index)
                if defined := [(at, e.value) for at, e in zip(x, estimates, strict=True) if not np.isnan(e.value)]:
                    text = f"{line.name}: τ {line.tau:.2f}" if metric == "survival" else line.name
                    ends.append((*defined[-1], text, *look(line.index)))
            dress(axis, f"{panel_title}  ({name})", "drafted position k")
            axis.set(xlim=(0.7, slots + 0.3), ylim=(-0.02, 1.02), xticks=range(1, slots + 1))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            axis.tick_params(labelleft=True)
            label_lines(axis, ends)
        axes[0].set_ylabel("acceptance rate")
    return save_figure(figure, path)


def results_figure(found: Results, path: Path | str, title: str, methods: Sequence[str] = ()) -> Path:
    """Draws ``acceptance_figure`` with a panel per temperature and a line per method of ``found`` (all, or ``methods``)."""
    methods = methods or found.distinct("method")
    panels, counts = [], {}
    for temperature in found.distinct("temperature"):
        here = found.at(temperature=temperature)
        lines = [
            Line(m, i, here.get(m, "tau").value, here.slots(m, "survival"), here.slots(m, "conditional"))
            for i, m in enumerate(methods)
            if here.measured(m)
        ]
        panels.append((f"T = {temperature:g}", lines))
        prompts = {group: here.count(lines[0].name, "prompts", group) for group in here.groups}
        parts = ", ".join(f"{n} {group}" for group, n in prompts.items() if group != MEAN)
        counts[temperature] = f"{prompts[MEAN]} prompts ({parts})"
    same = len(set(counts.values())) == 1
    text = next(iter(counts.values())) if same else "; ".join(f"T = {t:g}: {text}" for t, text in counts.items())
    runs = dict.fromkeys(str(own["run"]) for (_, m), own in found.details.items() if m in methods and own.get("run"))
    heading = [f"{text}; plain mean over domains; bars: {LEVEL:.0%} bootstrap over prompts"]
    return acceptance_figure(panels, path, title, [*heading, *(["runs: " + ", ".join(runs)] if runs else [])])


def headed_figure(
    title: str, lines: Sequence[str], heights: Sequence[float], width: float = WIDTH_IN
) -> tuple[Figure, list[SubFigure]]:
    """Returns a figure with a title and ``lines`` of small text, and a part per height in inches."""
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=DPI)
    partial.replace(path)
    return path


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


def label_lines(axis: Axes, ends: Sequence[tuple], gap: float = 0.062) -> None:
    """Names lines to the right of ``axis``; ``ends`` are (x, y) of the last point, text, color, marker.

    Labels lie at least ``gap`` of the axis's height apart, each with its marker and a thin line to its end. Call it after
    the limits are set.
    """
    to_fraction = axis.transData + axis.transAxes.inverted()
    ends = sorted(ends, key=lambda end: to_fraction.transform(end[:2])[1])
    heights = [to_fraction.transform(end[:2])[1] for end in ends]
    for (x, y, text, color, marker), height in zip(ends, spread_labels(heights, gap), strict=True):
        axis.annotate(
            "",
            xy=(x, y),
            xytext=(1.035, height),
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "linestyle": ":", "shrinkA": 0, "shrinkB": 4},
        )
        axis.plot([1.035], [height], marker, color=color, markersize=5, transform=axis.transAxes, clip_on=False)
        axis.text(1.06, height, text, transform=axis.transAxes, fontsize=8.5, va="center", color="#222222")


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Moves ascending ``heights`` as little as possible, so that they are ``gap`` apart and, where they fit, within 0..1."""
    placed: list[float] = []
    for height in heights:  # upwards, then back down from the top
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0.0))
    ceiling = max(1.0, gap * (len(heights) - 1))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 150, break_on_hyphens=False)
