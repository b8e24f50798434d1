"""Computes ratios, thresholds and exponents of measured steps without a clock and without torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.duel import Measured
from benchmarks.flops import products, step_flops
from benchmarks.shapes import GROWTH, SYMBOLS, Case, StepShape

LEAST_SPEED = {"fp32": 2.0, "bf16": 3.0}  # slots/s, times the peer's, at least
MOST_MEMORY = 1 / 3  # peak over imports, times the peer's, at most
MOST_TIME = {"fp32": 2.0, "bf16": 4.0}  # step time, times that of its FLOPs at the measured peak, at most
TIME_DEGREE = {"num_tokens": 1, "num_anchors": 1, "vocab_size": 1, "hidden_size": 2, "num_layers": 1}
FIT_TOLERANCE = 0.05


@dataclass(frozen=True)
class Threshold:
    """``value`` against ``bound``; ``met`` is None without a value, and ``note`` gives the reason."""

    name: str
    case: Case
    value: float | None
    bound: float
    at_least: bool
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def step_seconds(measured: Measured) -> float | None:
    """Returns the median; None where the case did not run."""
    return statistics.median(measured.seconds) if measured.seconds and measured.error is None else None


def middle_half(measured: Measured) -> tuple[float, float]:
    if len(measured.seconds) < 2:
        return measured.seconds[0], measured.seconds[0]
    low, _, high = statistics.quantiles(measured.seconds, n=4, method="inclusive")
    return low, high


def slots_per_second(measured: Measured) -> float | None:
    seconds = step_seconds(measured)
    return None if seconds is None else measured.slots / seconds


def added_bytes(measured: Measured) -> int | None:
    """Returns the peak over the size after imports."""
    return None if measured.error is not None else measured.peak_bytes - measured.imports_bytes


def seconds_at_own_rates(measured: Measured) -> float | None:
    """Returns the time of a step's FLOPs (own side), each product at its own rate."""
    if not measured.rates:
        return None
    rate = {(r["name"], r["part"]): r["flops_per_s"] for r in measured.rates}
    return sum(p.flops / len(p.parts) / rate[p.name, part] for p in products(measured.case) for part in p.parts)


def over_peak(measured: Measured) -> float | None:
    """Returns the median of a step's time over that of its FLOPs at the rate of the fastest product right after it."""
    flops = step_flops(measured.case)
    return statistics.median(s * peak / flops for s, peak in measured.beside_peak) if measured.beside_peak else None


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def thresholds(own: Measured, peer: Measured | None) -> list[Threshold]:
    """Returns the three thresholds of one case; those against the peer only with a peer."""
    case, found = own.case, []
    if peer is not None:
        note = f"speculators: {peer.error}" if peer.error else (own.error or "")
        speed = ratio(slots_per_second(own), slots_per_second(peer))
        memory = ratio(added_bytes(own), added_bytes(peer))
        found.append(Threshold("slots/s beside speculators", case, speed, LEAST_SPEED[case.dtype], True, note))
        found.append(Threshold("peak memory beside speculators", case, memory, MOST_MEMORY, False, note))
    if own.beside_peak or own.extras_error:
        note = "" if own.beside_peak else own.extras_error or ""
        found.append(Threshold("step time / FLOPs at peak", case, over_peak(own), MOST_TIME[case.dtype], False, note))
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Returns the slope of the least-squares line through the logarithms."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


@dataclass(frozen=True)
class Growth:
    """Growth along one axis: sizes with seconds and bytes, the fitted exponents, that of the FLOPs in this range, and the
    degree: the highest power of this size in the FLOPs and in the bytes."""

    axis: str
    side: str
    sizes: list[int]
    seconds: list[float]
    added: list[int]
    time_exponent: float
    memory_exponent: float
    flops_exponent: float
    degree: int

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.axis]

    @property
    def within(self) -> bool:
        return max(self.time_exponent, self.memory_exponent) <= self.degree + FIT_TOLERANCE


def growths(measured: dict[StepShape, dict[str, Measured]], axes: dict[str, list[StepShape]]) -> list[Growth]:
    """Fits growth along ``axes`` (axis -> shapes); a side with fewer than three results on an axis has no fit."""
    found = []
    sides = list(dict.fromkeys(side for results in measured.values() for side in results))
    for axis in GROWTH:
        for side in sides:
            ran = [measured[s][side] for s in axes.get(axis, []) if side in measured[s] and measured[s][side].error is None]
            if len(ran) < 3:
                continue
            sizes = [getattr(m.case.shape, axis) for m in ran]
            seconds, added = [step_seconds(m) for m in ran], [added_bytes(m) for m in ran]
            found.append(
                Growth(
                    axis=axis,
                    side=side,
                    sizes=sizes,
                    seconds=seconds,
                    added=added,
                    time_exponent=exponent(sizes, seconds),
                    memory_exponent=exponent(sizes, added),
                    flops_exponent=exponent(sizes, [step_flops(m.case) for m in ran]),
                    degree=TIME_DEGREE[axis],
                )
            )
    return found
