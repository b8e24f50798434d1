"""Part "scale" of the cache's benchmark: a store of 10,000 shards, in one process per format.

    open       from the list of shards to a reader that knows the missing ones (if the format can)
    first      the first record
    memory     growth of the process's resident bytes while it opens the store and reads all records in a random order

A shard has one document of 8 tokens with 4 paths of 16, so the cost is that of the number of shards, not of bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from benchmarks.cache_formats import FORMATS, write_all
from hyperdflash.contracts import Document
from hyperdflash.report.tables import markdown_table
from hyperdflash.states.store import Shard, make_shards

SHAPE = (4, 16)
TOKENS = 8
OPEN_MOST_S = 2.0


def many_shards(count: int) -> list[Shard]:
    ids = torch.arange(count * TOKENS).view(count, TOKENS)
    return make_shards([Document(f"d{i}", "chat", row, torch.ones(TOKENS, dtype=torch.bool)) for i, row in enumerate(ids)], 1)


def measure(options: Namespace) -> dict:
    """Returns per format the report of its process and the seconds of writing."""
    shards = many_shards(options.shards)
    states = torch.randn(TOKENS, *SHAPE).bfloat16()
    found = {}
    with TemporaryDirectory(dir=options.scratch) as scratch:
        for name in tqdm(options.formats or FORMATS, desc=f"{options.shards:,} shards", unit="format", mininterval=2):
            directory = Path(scratch) / name.replace(" ", "-")
            started = time.perf_counter()
            write_all(FORMATS[name](directory, *SHAPE), shards, lambda _: states)
            seconds = time.perf_counter() - started
            runs = []
            for _ in range(min(3, options.rounds)):
                runs.append(run_alone(name, directory, options.shards))
            found[name] = {"write_s": seconds, **{key: sorted(run[key] for run in runs)[len(runs) // 2] for key in runs[0]}}
    return {"shards": options.shards, "rounds": min(3, options.rounds), "formats": found}


def run_alone(name: str, directory: Path, count: int) -> dict[str, float]:
    """Runs ``measure_one`` in a new process."""
    command = [sys.executable, "-m", "benchmarks.cache_scale", name, str(directory), str(count)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(record: dict) -> list[str]:
    rows = []
    for name, run in record["formats"].items():
        opened = f"**{run['open_s']:.3f}**" if run["open_s"] < OPEN_MOST_S else f"{run['open_s']:.3f}"
        cells = [opened, f"{1e3 * run['first_s']:.2f}", f"{1e6 * run['read_s'] / record['shards']:,.0f}"]
        rows.append([name, *cells, f"{run['memory_bytes'] / 1e6:,.1f}", f"{run['write_s']:.1f}"])
    header = ["Format", "open s", "first record ms", "a record µs", "memory MB", "written in s"]
    return [
        f"### {record['shards']:,} shards",
        "",
        *markdown_table(header, rows),
        "",
        f"Medians of {record['rounds']} processes per format. Memory: growth of the resident set over opening the store and "
        f"reading every shard in a random order. Bold: opened in under {OPEN_MOST_S:g} s.",
    ]


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status: this part of the bench needs Linux")


def measure_one(name: str, directory: str, count: str) -> dict[str, float]:
    """Returns the seconds to open the store, to read the first record and to read all, and the growth of memory in bytes."""
    shards = many_shards(int(count))
    form = FORMATS[name](Path(directory), *SHAPE)
    order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(0)).tolist()
    before = _resident_bytes()
    started = time.perf_counter()
    read = form.open(shards)
    opened = time.perf_counter()
    read(shards[order[0]], 0)
    first = time.perf_counter()
    for index in order:
        read(shards[index], 0)
    done = time.perf_counter()
    times = {"open_s": opened - started, "first_s": first - opened, "read_s": done - first}
    return {**times, "memory_bytes": _resident_bytes() - before}


if __name__ == "__main__":
    print(json.dumps(measure_one(*sys.argv[1:])))
