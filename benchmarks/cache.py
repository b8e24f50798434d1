"""The cache of target states, measured: formats side by side, a store of 10,000 shards, codecs.

    make bench-cache
    python -m benchmarks.cache --out experiments/<date>-bench-cache
    python -m benchmarks.cache codecs --out runs/bench-cache            # one part; the others stay as they were in --out

Each part writes <part>.json; cache.md and the pictures are drawn from all that are in --out. A busy machine makes the rates
meaningless: the load before each part is in its record.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks import cache_codecs, cache_rates, cache_scale
from benchmarks.cache_figure import formats_figure
from benchmarks.cache_formats import FORMATS
from hyperdflash.identity import runs_dir
from hyperdflash.record import environment_record, script_command, write_json

# name -> module with measure(options) -> dict and table(record) -> lines of Markdown; the order is that of cache.md
PARTS = {"formats": cache_rates, "scale": cache_scale, "codecs": cache_codecs}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    command = script_command("benchmarks.cache", arguments)
    for name in options.parts or PARTS:
        load = os.getloadavg()[0]
        environment = environment_record(command)
        environment["packages"] |= {package: version(package) for package in ("xxhash", "pyarrow")}
        record = {**PARTS[name].measure(options), "load_before": load, "environment": environment}
        write_json(options.out / f"{name}.json", record)
    print(render(options.out))
    print(f"wrote {options.out}/cache.md")


def render(out: Path) -> str:
    """cache.md and the pictures of every part that ``out`` has; returns the Markdown."""
    lines = []
    for name, part in PARTS.items():
        path = out / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        lines += [
            *part.table(record),
            "",
            f"`{record['environment']['command']}`, load before it {record['load_before']:.1f}",
            "",
        ]
        if name == "formats":
            formats_figure(record, out / "formats.png")
    text = "\n".join(lines)
    (out / "cache.md").write_text(text)
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them where none is given")
    parser.add_argument("--out", type=Path, default=runs_dir() / "bench-cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="all where none is given")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="mean length of a record")
    parser.add_argument("--paths", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--target", default="assets/tiny", help="whose states the codecs are tried on")
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts of each domain, for the codecs")
    parser.add_argument("--scratch", type=Path, help="where the files go meanwhile; the system's temporary directory")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    return options


if __name__ == "__main__":
    main()
