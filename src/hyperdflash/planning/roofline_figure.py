"""The roofline's picture: what verification costs, the drafter's share, predicted beside published speedup."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator, PercentFormatter

from hyperdflash.planning.roofline import Method, Setting
from hyperdflash.report.figures import COLOURS, DPI, MARKERS, label_lines


def roofline_figure(setting: Setting, path: Path | str) -> Path:
    """Writes a PNG: cost of n tokens and the drafter's share above, predicted and published speedup a method below."""
    width = 12.0
    heights = (0.75, 3.6, 3.4)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    head, above, below = figure.subfigures(3, 1, height_ratios=heights)
    head.text(0.012, 1 - 0.12 / heights[0], "Roofline of a draft-verify round", fontsize=13, fontweight="bold", va="top")
    head.text(0.012, 1 - 0.45 / heights[0], str(setting), fontsize=8.5, va="top", color="#333333")
    verify, share = above.subplots(1, 2)
    _verify_panel(verify, setting)
    _share_panel(share, setting)
    below.suptitle(
        "Predicted speedup. Dots: every token draws its own experts; dashes: the tokens of a row share one draw. "
        "Orange: published",
        fontsize=10,
    )
    panels = below.subplots(1, len(setting.methods), sharey=True, squeeze=False)[0]
    for axis, method in zip(panels, setting.methods, strict=True):
        _speedup_panel(axis, setting, method)
    panels[0].set_ylabel("speedup over AR")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def _verify_panel(axis: Axes, setting: Setting) -> None:
    """Batch sizes are ordered, so their colours are: dark to light."""
    ramp = matplotlib.colormaps["viridis"]
    ends = []
    for i, batch in enumerate(setting.batches):
        colour, marker = ramp(0.85 * i / max(1, len(setting.batches) - 1)), MARKERS[i % len(MARKERS)]
        values = [setting.ratio(n, batch) for n in setting.counts]
        axis.plot(setting.counts, values, color=colour, marker=marker, markersize=3.5, linewidth=1.4)
        ends.append((setting.max_tokens, values[-1], f"batch size {batch}", colour, marker))
    values = [setting.ratio(n, setting.batches[0], True) for n in setting.counts]
    axis.plot(setting.counts, values, color="#555555", linestyle="--", linewidth=1.4)
    ends.append((setting.max_tokens, values[-1], f"batch size {setting.batches[0]}, same experts", "#555555", "_"))
    _dress(axis, "Time of verifying n tokens over that of one", "tokens verified a row, n")
    axis.set_ylim(bottom=0)
    axis.set_xlim(0.5, setting.max_tokens + 0.5)
    label_lines(axis, ends)


def _share_panel(axis: Axes, setting: Setting) -> None:
    ends = []
    for i, method in enumerate(setting.methods):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        values = [setting.round(method, batch).drafter_share for batch in setting.batches]
        axis.plot(setting.batches, values, color=colour, marker=marker, markersize=5, linewidth=1.6)
        ends.append((setting.batches[-1], values[-1], method.name, colour, marker))
    _dress(axis, "The drafter's share of a round", "batch size")
    _batch_axis(axis, setting)
    axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylim(bottom=0)
    label_lines(axis, ends)


def _speedup_panel(axis: Axes, setting: Setting, method: Method) -> None:
    own, same = ([setting.round(method, batch, shared).speedup for batch in setting.batches] for shared in (False, True))
    axis.fill_between(setting.batches, own, same, color=COLOURS[1], alpha=0.15, linewidth=0)
    axis.plot(setting.batches, own, color=COLOURS[1], marker="o", markersize=3.5, linewidth=1.5)
    axis.plot(setting.batches, same, color=COLOURS[1], linestyle="--", linewidth=1.5)
    axis.axhline(method.speedup, color=COLOURS[0], linewidth=1.5)
    axis.axhline(1, color="#999999", linewidth=0.8)
    _dress(axis, f"{method.name}\nτ {method.tau:g}, published {method.speedup:.2f}×", "batch size")
    _batch_axis(axis, setting)
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g×"))
    axis.tick_params(labelleft=True)
    axis.set_ylim(0, 1.08 * max(m.tau for m in setting.methods))


def _batch_axis(axis: Axes, setting: Setting) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(list(setting.batches)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FormatStrFormatter("%d"))


def _dress(axis: Axes, title: str, xlabel: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
