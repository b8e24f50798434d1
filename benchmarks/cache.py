"""Measures the cache of target states: layouts in turn, a store of 10,000 shards, codecs.

    make bench-cache
    python -m benchmarks.cache codecs           # one part; the others of results/cache.json stay unchanged

Rates on a busy machine are meaningless, so each part's record has the load before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import cache_codecs, cache_rates, cache_scale
from benchmarks.cache_formats import FORMATS
from benchmarks.cache_rates import LEAST_SHARE, rates
from benchmarks.result import environment, option_parser, write_result
from hyperdflash.report.figures import COLORS, DPI

# name -> module with measure(options) -> dict and table(record) -> lines of Markdown
PARTS = {"formats": cache_rates, "scale": cache_scale, "codecs": cache_codecs}
RATES = (("write", "write"), ("sequential", "plain sequential read"), ("shuffled", "shuffled records"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("cache", __doc__, rounds=5, threads=1)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them where none is given")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="all where none is given")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="mean length of a record")
    parser.add_argument("--paths", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--target", default="assets/tiny", help="whose states the codecs encode")
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts of each domain, for the codecs")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files; by default the system's")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    path = options.out / "cache.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for name in options.parts or PARTS:
        measured_in = environment("cache", arguments)
        record[name] = {**PARTS[name].measure(options), "environment": measured_in}
    lines = [line for name, part in PARTS.items() if name in record for line in (*part.table(record[name]), "")]
    if "formats" in record:
        formats_figure(record["formats"], options.out / "cache.png")
    write_result(options.out, "cache", record, lines, measured_in)


def formats_figure(record: dict, path: Path) -> None:
    """Draws GB/s of writing and both kinds of reading on the left, the share with a threshold on the right."""
    names = list(record["formats"])[::-1]
    found = [rates(record["formats"][name]) for name in names]
    figure = Figure(figsize=(11.0, 1.2 + 0.62 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for order, (key, label) in enumerate(RATES):
        places = [i + 0.27 * (1 - order) for i in range(len(names))]
        left.barh(places, [r[key] / 1e3 for r in found], height=0.25, color=COLORS[order], label=label)
    left.set_yticks(range(len(names)), names, fontsize=9)
    left.set_xlabel("GB/s, files in the page cache")
    figure.legend(loc="outside upper left", ncols=len(RATES), fontsize=9, frameon=False)
    for place, r in enumerate(found):
        right.barh(place, r["share"], height=0.5, color=COLORS[2], alpha=1.0 if r["share"] >= LEAST_SHARE else 0.4)
        right.text(r["share"], place, f" {r['share']:.0%}", va="center", fontsize=9)
    right.axvline(LEAST_SHARE, color="black", linewidth=1.2)
    right.set_xlabel(f"shuffled records / sequential read (line: {LEAST_SHARE:.0%})")
    right.set_xlim(0, 1.18 * max(LEAST_SHARE, *(r["share"] for r in found)))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    main()
