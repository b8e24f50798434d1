"""Figures, drawn without a display. ``acceptance_figure`` has the form of the paper's Figure 1.

The paper does not say whether its per-position rates are survival or conditional: both are shown, side by side.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from src.report.bootstrap import MEAN, Estimate
from src.report.summary import Summary
from src.report.tables import label

# Okabe and Ito's palette: told apart with any common colour blindness; markers repeat the distinction in print
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS = (
    ("survival", "Survival: at least k drafts accepted"),
    ("conditional", "Conditional: slot k accepted, given all earlier ones"),
)
WIDTH_IN, ROW_IN, DPI = 11.0, 3.9, 150


def acceptance_figure(summary: Summary, path: Path | str, title: str = "Per-position acceptance") -> Path:
    """Writes a PNG: a row a temperature, survival left and conditional right, a line a method, 95% intervals."""
    temperatures = summary.temperatures
    runs, longest = list(dict.fromkeys(m.run_id for m in summary.methods if m.run_id)), 150
    head = 0.75 + 0.2 * (len(_wrap(runs, longest)) if runs else 0)  # inches
    height = ROW_IN * len(temperatures) + head
    figure, axes = plt.subplots(len(temperatures), 2, figsize=(WIDTH_IN, height), sharex=True, sharey=True, squeeze=False)
    names = list(dict.fromkeys(m.name for m in summary.methods))  # a method keeps its colour in every row
    slots = max(m.num_slots for m in summary.methods)
    for row, temperature in zip(axes, temperatures, strict=True):
        methods = summary.at(temperature)
        for axis, (metric, panel_title) in zip(row, PANELS, strict=True):
            for method in methods:
                index = names.index(method.name)
                offset = 0.035 * (index - (len(names) - 1) / 2)  # error bars beside each other
                _line(axis, getattr(method.groups[MEAN], metric), index, offset, label(method))
            axis.set_title(f"{panel_title}  (T = {temperature:g})", fontsize=10)
            axis.set_xlim(0.7, slots + 0.3)
            axis.set_ylim(0, 1)
            axis.set_xticks(range(1, slots + 1))
            axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelbottom=True, labelleft=True)
        row[0].set_ylabel("acceptance rate")
        row[0].legend(fontsize=8, frameon=False, loc="upper right")
    for axis in axes[-1]:
        axis.set_xlabel("drafted position k")
    figure.tight_layout(rect=(0, 0, 1, 1 - head / height), h_pad=2.0)
    _heading(figure, summary, title, runs, longest, height)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def _line(axis: Axes, estimates: tuple[Estimate, ...], index: int, offset: float, text: str) -> None:
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
        label=text,
    )


def _heading(figure, summary: Summary, title: str, runs: list[str], longest: int, height: float) -> None:
    counts = []
    for temperature in summary.temperatures:
        groups = summary.at(temperature)[0].groups
        parts = ", ".join(f"{groups[g].prompts} {g}" for g in summary.groups[:-1])
        counts.append(f"T = {temperature:g}: {groups[MEAN].prompts} prompts ({parts})")
    shared = len({c.split(": ")[1] for c in counts}) == 1
    subtitle = counts[0].split(": ")[1] if shared else "; ".join(counts)
    figure.text(0.01, 1 - 0.12 / height, title, fontsize=13, fontweight="bold", va="top")
    subtitle += "; plain mean over domains; bars: 95% bootstrap over prompts"
    figure.text(0.01, 1 - 0.38 / height, subtitle, fontsize=9, va="top")
    if runs:
        text = "\n".join(_wrap(runs, longest))
        figure.text(0.01, 1 - 0.58 / height, text, fontsize=7.5, va="top", color="#444444")


def _wrap(runs: list[str], longest: int) -> list[str]:
    """Run ids in lines of at most ``longest`` characters."""
    lines = ["runs: " + runs[0]]
    for run in runs[1:]:
        if len(lines[-1]) + 2 + len(run) > longest:
            lines.append("          " + run)
        else:
            lines[-1] += ", " + run
    return lines
