"""Splits a round's time into drafting, verification and the rest, and predicts the speedup from these terms.

    tokens per round and row  tau = emitted tokens / (rounds * rows)
    predicted speedup         tau * T_ar / (T_draft + T_verify + T_rest), medians over rounds; T_ar is AR's sum of the three
                              over its own tau, which is 1 unless rows have ended
    measured speedup          tokens/s over AR's tokens/s, sums over all rounds

Both speedups are against AR at the same batch size, whose rows go in lockstep at equal lengths. Medians ignore a slow round,
sums do not: a ratio far from 1 shows that the typical round does not explain the time (few slow rounds, or rounds that grow
with the text).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hyperdflash.report.figures import COLORS, headed_figure, save_figure
from hyperdflash.report.measure import AUTOREGRESSIVE
from hyperdflash.report.results import csv_text, write_report
from hyperdflash.report.tables import GAP, Table, markdown, number_text, or_gap
from hyperdflash.settings import positive_int

# field, name, color, color of a number on it
TERMS = (
    ("draft_ms", "T_draft", COLORS[3], "#222222"),
    ("verify_ms", "T_verify", COLORS[1], "#ffffff"),
    ("rest_ms", "T_rest", "#BBBBBB", "#222222"),
)


@dataclass(frozen=True, eq=False)
class RoundTimes:
    """R rounds and N prefills of one method at one batch size; ValueError where lengths differ or nothing was measured.

    ``draft``, ``verify``, ``rest`` [R] float64 seconds per round of all rows; ``emitted`` [R] int64 tokens that all
    ``batch_size`` rows gain in it; ``first_token`` [N] float64 seconds from the prompt to the first token.
    """

    method: str
    batch_size: int
    draft: np.ndarray
    verify: np.ndarray
    rest: np.ndarray
    emitted: np.ndarray
    first_token: np.ndarray

    def __post_init__(self):
        positive_int("batch_size", self.batch_size)
        rounds = len(self.emitted)
        if not rounds or not len(self.first_token):
            raise ValueError(f"{self} has {rounds} rounds and {len(self.first_token)} prefills; each must be measured once")
        if not len(self.draft) == len(self.verify) == len(self.rest) == rounds:
            raise ValueError(
                f"{self}: {rounds} rounds beside {len(self.draft)} draft, {len(self.verify)} verify and {len(self.rest)} rest "
                "times; each needs one entry per round"
            )

    def __str__(self) -> str:
        return f"{self.method} at batch size {self.batch_size}"


@dataclass(frozen=True)
class Cost:
    """Medians per round in ms (``first_token_ms`` per prefill), ``tau``, and speedups over AR, NaN where AR is missing."""

    method: str
    batch_size: int
    rounds: int
    draft_ms: float
    verify_ms: float
    rest_ms: float
    first_token_ms: float
    tau: float
    tokens_per_second: float
    predicted: float
    measured: float

    @property
    def round_ms(self) -> float:
        return self.draft_ms + self.verify_ms + self.rest_ms

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


def costs(times: Sequence[RoundTimes]) -> list[Cost]:
    """Returns costs by ascending batch size, methods in the given order; ValueError for a doubled method or for none."""
    seen = [(t.batch_size, t.method) for t in times]
    if not times:
        raise ValueError("no round times to report; time a decoding run first")
    if doubled := [key for key in seen if seen.count(key) > 1]:
        raise ValueError(f"{doubled[0][1]} at batch size {doubled[0][0]} was given more than once: join its rounds first")
    found = []
    for batch_size in sorted({t.batch_size for t in times}):
        batch = [t for t in times if t.batch_size == batch_size]
        reference = [_cost(t, None) for t in batch if t.method == AUTOREGRESSIVE]
        found += [_cost(t, reference[0] if reference else None) for t in batch]
    return found


def _cost(times: RoundTimes, reference: Cost | None) -> Cost:
    draft, verify, rest, first = (
        1e3 * float(np.median(seconds)) for seconds in (times.draft, times.verify, times.rest, times.first_token)
    )
    tau = float(np.sum(times.emitted)) / (len(times.emitted) * times.batch_size)
    speed = float(np.sum(times.emitted) / np.sum([times.draft, times.verify, times.rest]))
    predicted = tau * reference.round_ms / (draft + verify + rest) / reference.tau if reference else math.nan
    measured = speed / reference.tokens_per_second if reference else math.nan
    return Cost(times.method, times.batch_size, len(times.emitted), draft, verify, rest, first, tau, speed, predicted, measured)


def write_cost_report(times: Sequence[RoundTimes], out: Path | str, setting: str) -> list[Path]:
    """Writes cost.md, cost.csv, cost.json and cost.png into ``out``; ``setting`` as in ``cost_markdown``."""
    found = costs(times)
    rows = [asdict(cost) | {"ratio": cost.ratio} for cost in found]
    lines = [[value if isinstance(value, str) else _digits(value) for value in row.values()] for row in rows]
    contents = {
        "cost.md": cost_markdown(found, setting),
        "cost.csv": csv_text(rows[0], lines),
        "cost.json": {"setting": setting, "costs": rows},
    }
    return [*write_report(out, contents), cost_figure(found, Path(out) / "cost.png", setting)]


def cost_markdown(found: Sequence[Cost], setting: str) -> str:
    """Returns one table; ``setting`` names what the times depend on: target, machine, length of the texts."""
    header = ["Batch", "Method", "T_draft", "T_verify", "T_rest", "round", "τ", "first token", "tokens/s"]
    rows, shown = [], None
    for cost in found:
        times = (cost.draft_ms, cost.verify_ms, cost.rest_ms, cost.round_ms)
        row = [str(cost.batch_size) if cost.batch_size != shown else "", cost.method, *map(_ms, times)]
        row += [number_text(cost.tau), _ms(cost.first_token_ms), number_text(cost.tokens_per_second, 1)]
        row += [*map(_times, (cost.predicted, cost.measured)), or_gap(number_text(cost.ratio)), str(cost.rounds)]
        rows.append(row)
        shown = cost.batch_size
    notes = (
        f"{setting}. Times in ms, medians over rounds (first token: over prefills); rows of a batch in lockstep at equal "
        "lengths. τ: tokens that a row gains per round. Predicted: τ · T_ar / (T_draft + T_verify + T_rest); measured: "
        f"tokens/s over AR's; both at the same batch size; {GAP}: no AR there. A tiny target's verification says nothing of a "
        "large one's: see the roofline (python -m src.roofline)."
    )
    return markdown([Table([*header, "predicted speedup", "measured speedup", "measured / predicted", "rounds"], rows), notes])


def cost_figure(found: Sequence[Cost], path: Path | str, setting: str, title: str = "Where the time of a round goes") -> Path:
    """Writes a PNG: a panel per batch size, a stacked bar per method, its speedups at the end of the bar."""
    panels: dict[int, list[Cost]] = {}
    for cost in found:
        panels.setdefault(cost.batch_size, []).append(cost)
    heights = [0.55 + 0.34 * len(panel) for panel in panels.values()]  # inches
    figure, (part,) = headed_figure(title, [setting], [sum(heights) + 0.45], width=11.0)
    axes = part.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    widest = max(cost.round_ms for cost in found)
    for axis, (size, panel) in zip(axes, panels.items(), strict=True):
        left = np.zeros(len(panel))
        for name, label, color, ink in TERMS:
            widths = np.array([getattr(cost, name) for cost in panel])
            style = {"color": color, "height": 0.66, "edgecolor": "white", "linewidth": 0.8, "label": label}
            bars = axis.barh(range(len(panel)), widths, left=left, **style)
            numbers = [_ms(width) if width > 0.045 * widest else "" for width in widths]
            axis.bar_label(bars, numbers, label_type="center", fontsize=8, color=ink)
            left += widths
        axis.bar_label(bars, [_bar_text(cost) for cost in panel], padding=5, fontsize=8.5, color="#222222")
        axis.set_yticks(range(len(panel)), [cost.method for cost in panel], fontsize=9)
        axis.set_ylim(len(panel) - 0.45, -0.55)
        axis.set_title(f"batch size {size}", fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(TERMS), frameon=False, fontsize=9)
    axes[-1].set_xlim(0, 1.42 * widest)
    axes[-1].set_xlabel("ms per round (median)")
    return save_figure(figure, path)


def _bar_text(cost: Cost) -> str:
    if math.isnan(cost.measured) or cost.method == AUTOREGRESSIVE:
        return f"τ {cost.tau:.2f}"
    return f"τ {cost.tau:.2f}   measured {_times(cost.measured)}, predicted {_times(cost.predicted)}"


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}" if isinstance(value, float) else str(value)


def _ms(value: float) -> str:
    """Writes about three digits: 0.123, 1.23, 12.3, 123."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return number_text(value, digits)


def _times(value: float) -> str:
    return GAP if math.isnan(value) else f"{number_text(value)}×"
