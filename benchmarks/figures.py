"""Draws a run as two pictures: ratios beside their thresholds, and growth on logarithmic axes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.tables import OWN, PEER
from benchmarks.verdict import Growth, Threshold
from hyperdflash.report.figures import COLORS, DPI, MARKERS

SIDE = {OWN: 0, PEER: 1}


def thresholds_figure(found: list[Threshold], path: Path) -> Path:
    """Draws one panel per threshold: measured ratios, and a line at the bound; "n/a" without a value."""
    names = sorted({bar.name for bar in found})
    figure = Figure(figsize=(11.0, 2.9 * len(names)), layout="constrained")
    for axis, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        _bars(axis, [bar for bar in found if bar.name == name])
        axis.set_title(name, fontsize=10, loc="left")
    figure.savefig(path, dpi=DPI)
    return path


def growth_figure(found: list[Growth], path: Path) -> Path:
    """Draws time above, memory below, one column per size; dashed: the degree's slope through this project's first point."""
    axes_of = list(dict.fromkeys(g.axis for g in found))
    figure = Figure(figsize=(2.7 * len(axes_of) + 0.6, 6.4), layout="constrained")
    panels = figure.subplots(2, len(axes_of), squeeze=False)
    for column, name in enumerate(axes_of):
        along = [g for g in found if g.axis == name]
        for g in along:
            index = SIDE.get(g.side, 2)
            style = {"color": COLORS[index], "marker": MARKERS[index], "linewidth": 1.5, "markersize": 4}
            for axis, values, slope in (
                (panels[0][column], [1e3 * s for s in g.seconds], g.time_exponent),
                (panels[1][column], [b / 1e6 for b in g.added], g.memory_exponent),
            ):
                axis.plot(g.sizes, values, label=f"{g.side}: {slope:.2f}", **style)
                if g.side == OWN:
                    steepest = [values[0] * (size / g.sizes[0]) ** g.degree for size in g.sizes]
                    axis.plot(g.sizes, steepest, "--", color="#999999", linewidth=1, label=f"degree {g.degree}")
        for axis in panels[:, column]:
            _log(axis, along[0].sizes)
        panels[1][column].set_xlabel(along[0].symbol)
    panels[0][0].set_ylabel("step, ms")
    panels[1][0].set_ylabel("peak over imports, MB")
    figure.savefig(path, dpi=DPI)
    return path


def _bars(axis: Axes, found: list[Threshold]) -> None:
    shapes = list(dict.fromkeys(bar.case.shape.name for bar in found))
    dtypes = list(dict.fromkeys(bar.case.dtype for bar in found))
    width = 0.8 / len(dtypes)
    for bar in found:
        place = shapes.index(bar.case.shape.name) + width * (dtypes.index(bar.case.dtype) - (len(dtypes) - 1) / 2)
        color = COLORS[dtypes.index(bar.case.dtype)]
        if bar.value is None:
            axis.text(place, 0, "n/a", ha="center", va="bottom", fontsize=8, color=color)
        else:
            axis.bar(place, bar.value, 0.9 * width, color=color, alpha=1.0 if bar.met else 0.45)
            at_foot = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 8}  # where no bound lies
            axis.annotate(f"{bar.value:.2f}", (place, 0), color="white" if bar.met else "black", **at_foot)
        axis.plot([place - width / 2, place + width / 2], [bar.bound] * 2, color="black", linewidth=1.5)
    axis.set_xticks(range(len(shapes)), shapes, fontsize=8)
    axis.set_xlim(-0.5, len(shapes) - 0.5)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [axis.bar([0], [0], color=COLORS[i], label=dtype) for i, dtype in enumerate(dtypes)]
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axis.legend(handles=handles, fontsize=8, frameon=False, title="pale: threshold not met", title_fontsize=8, **beside)


def _log(axis: Axes, sizes: list[int]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=6.5)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="y", which="both", labelsize=6.5)
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
