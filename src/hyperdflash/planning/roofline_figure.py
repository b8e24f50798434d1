"""Draws the roofline: the cost of verification, the drafter's share, and predicted beside published speedups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator, PercentFormatter

from hyperdflash.planning.roofline import Setting
from hyperdflash.report.figures import dress, headed_figure, label_lines, look, save_figure


def roofline_figure(setting: Setting, path: Path | str) -> Path:
    """Writes a PNG: the cost of n tokens and the drafter's share above, predicted and published speedups per method below."""
    note = "Below: predicted speedup (dashes: the tokens of a row share one draw of experts) and the published one (line)"
    figure, (above, below) = headed_figure("Roofline of a draft-verify round", [str(setting), note], [3.6, 3.4])
    verify, share = above.subplots(1, 2)
    dress(verify, "Time of verifying n tokens over that of one", "tokens verified per row, n")
    lines = [(f"batch size {b}", [setting.ratio(n, b) for n in setting.counts]) for b in setting.batches]
    first = setting.batches[0]
    lines.append((f"batch size {first}, same experts", [setting.ratio(n, first, True) for n in setting.counts]))
    _lines(verify, setting.counts, lines)
    dress(share, "The drafter's share of a round", "batch size")
    share.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    shares = [(m.name, [setting.round(m, batch).drafter_share for batch in setting.batches]) for m in setting.methods]
    _batch_axis(share, setting)
    _lines(share, setting.batches, shares)
    panels = below.subplots(1, len(setting.methods), sharey=True, squeeze=False)[0]
    for axis, method in zip(panels, setting.methods, strict=True):
        for same, style in ((False, "o-"), (True, "--")):
            speedups = [setting.round(method, batch, same).speedup for batch in setting.batches]
            axis.plot(setting.batches, speedups, style, color=look(1)[0], markersize=3.5, linewidth=1.5)
        axis.axhline(method.speedup, color=look(0)[0], linewidth=1.5)
        dress(axis, f"{method.name}\nτ {method.tau:g}, published {method.speedup:.2f}×", "batch size")
        _batch_axis(axis, setting)
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g×"))
        axis.set_ylim(0, 1.08 * max(m.tau for m in setting.methods))
    panels[0].set_ylabel("speedup over AR")
    return save_figure(figure, path)


def _lines(axis: Axes, x: Sequence[int], lines: Sequence[tuple[str, Sequence[float]]]) -> None:
    ends = []
    for i, (name, values) in enumerate(lines):
        color, marker = look(i)
        axis.plot(x, values, color=color, marker=marker, markersize=4, linewidth=1.5)
        ends.append((x[-1], values[-1], name, color, marker))
    axis.set_ylim(bottom=0)
    label_lines(axis, ends)


def _batch_axis(axis: Axes, setting: Setting) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(list(setting.batches)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FormatStrFormatter("%d"))
