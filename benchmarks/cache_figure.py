"""The formats' rates as bars."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.cache_rates import BAR, rates
from hyperdflash.report.figures import COLOURS, DPI

RATES = (("write", "write"), ("sequential", "plain sequential read"), ("shuffled", "shuffled records"))


def formats_figure(record: dict, path: Path) -> Path:
    """Left: GB/s of writing and both kinds of reading; right: the share that the bar is about."""
    names = list(record["formats"])[::-1]
    found = [rates(record["formats"][name]) for name in names]
    figure = Figure(figsize=(11.0, 1.2 + 0.62 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for order, (key, label) in enumerate(RATES):
        places = [i + 0.27 * (1 - order) for i in range(len(names))]
        left.barh(places, [r[key] / 1e3 for r in found], height=0.25, color=COLOURS[order], label=label)
    left.set_yticks(range(len(names)), names, fontsize=9)
    left.set_xlabel("GB/s, files in the page cache")
    figure.legend(loc="outside upper left", ncols=len(RATES), fontsize=9, frameon=False)
    for place, r in enumerate(found):
        right.barh(place, r["share"], height=0.5, color=COLOURS[2], alpha=1.0 if r["share"] >= BAR else 0.4)
        right.text(r["share"], place, f" {r['share']:.0%}", va="center", fontsize=9)
    right.axvline(BAR, color="black", linewidth=1.2)
    right.set_xlabel(f"shuffled records / sequential read (line: {BAR:.0%})")
    right.set_xlim(0, 1.18 * max(BAR, *(r["share"] for r in found)))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
