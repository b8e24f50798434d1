"""Part "formats" of the cache's benchmark: rates of writing and reading records of the paper's size.

A round takes every format in turn, so that a slow moment of the machine affects all: write; then, with the files in the page
cache, read the files sequentially, read the first record by a new reader, and read all records in a random order by another
new reader without open files (of thousands of shards it would have few open too).

A read of a record ends when XXH3 has processed its states once: within this cache's own read, after the read of other formats
(otherwise a mapped file would not be read). The sequential read is ``readinto`` of one 4 MiB buffer, which stays in the
processor's cache, and does not look at the bytes.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm
from xxhash import xxh3_64_intdigest

from benchmarks.cache_formats import FORMATS, Format, Read, write_all
from hyperdflash.contracts import Document
from hyperdflash.report.tables import markdown_table
from hyperdflash.states.store import Shard, make_shards

LEAST_SHARE = 0.8  # shuffled records against a plain sequential read
DOCUMENTS_PER_SHARD = 16


def make_records(count: int, mean_tokens: int, seed: int = 0) -> list[Document]:
    """Draws documents of log-normal lengths around ``mean_tokens``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.exp(0.6 * torch.randn(count, generator=generator) - 0.18) * mean_tokens
    lengths = [max(4, int(value)) for value in drawn]
    return [
        Document(f"d{i}", "chat", torch.randint(0, 129280, (length,), generator=generator), torch.arange(length) >= length // 3)
        for i, length in enumerate(lengths)
    ]


def state_source(shards: list[Shard], num_paths: int, hidden_size: int):
    """Returns a function of a shard's states [N, M, D] bf16, slices of random numbers drawn once."""
    most = max(shard.num_tokens for shard in shards)
    drawn = torch.randn(most, num_paths, hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    return lambda shard: drawn[: shard.num_tokens]


def sequential(directory: Path, buffer: memoryview) -> None:
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def see(states: Tensor) -> int:
    return xxh3_64_intdigest(memoryview(states.contiguous().view(torch.uint8).numpy()).cast("B"))


def shuffled(form: Format, read: Read, places: list[tuple[Shard, int]]) -> None:
    for shard, index in places:
        record = read(shard, index)
        if not form.checks:
            see(record[2])


def flush(directory: Path) -> None:
    """Writes dirty pages to the disk, so that the timed reads do not compete with them."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def measure(options: Namespace) -> dict:
    """Returns per format the seconds of each round and the bytes."""
    torch.set_num_threads(options.threads)
    documents = make_records(options.records, options.tokens)
    shards = make_shards(documents, DOCUMENTS_PER_SHARD)
    states = state_source(shards, options.paths, options.hidden)
    tokens = sum(shard.num_tokens for shard in shards)
    places = [(shard, index) for shard in shards for index in range(len(shard.documents))]
    buffer = memoryview(bytearray(4 << 20))
    found: dict[str, dict] = {
        name: {"write_s": [], "sequential_s": [], "shuffled_s": [], "first_s": []} for name in options.formats or FORMATS
    }
    with (
        TemporaryDirectory(dir=options.scratch) as scratch,
        tqdm(total=len(found) * options.rounds, desc="cache formats", unit="round", mininterval=2) as bar,
    ):
        for number in range(options.rounds):
            order = torch.randperm(len(places), generator=torch.Generator().manual_seed(number)).tolist()
            for name, times in found.items():
                directory = Path(scratch) / "store"
                form = FORMATS[name](directory, options.paths, options.hidden)
                times["write_s"].append(_timed(lambda form=form: write_all(form, shards, states)))
                flush(directory)
                sequential(directory, buffer)
                times["sequential_s"].append(_timed(lambda directory=directory: sequential(directory, buffer)))
                times["first_s"].append(_timed(lambda form=form, first=places[order[0]]: form.open(shards)(*first)))
                read = form.open(shards)
                times["shuffled_s"].append(_timed(lambda f=form, r=read, o=order: shuffled(f, r, [places[i] for i in o])))
                times["bytes"] = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
                times["files"] = sum(path.is_file() for path in directory.rglob("*"))
                times["checks"] = form.checks
                del read
                shutil.rmtree(directory)
                bar.update()
    shape = {"records": len(places), "tokens": tokens, "paths": options.paths, "hidden": options.hidden}
    return {**shape, "rounds": options.rounds, "formats": found}


def _timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rates(times: dict) -> dict[str, float]:
    """Returns medians over the rounds: decimal MB/s, and the share of paired rounds."""
    size = times["bytes"]
    found = {
        name: statistics.median(size / s for s in times[f"{name}_s"]) / 1e6 for name in ("write", "sequential", "shuffled")
    }
    pairs = zip(times["sequential_s"], times["shuffled_s"], strict=True)
    return {**found, "share": statistics.median(a / b for a, b in pairs), "first_ms": 1e3 * statistics.median(times["first_s"])}


def table(record: dict) -> list[str]:
    header = ["Format", "files", "bytes per token", *(f"{name} MB/s" for name in ("write", "sequential", "shuffled"))]
    header += ["share", "first record ms"]
    rows = []
    for name, times in record["formats"].items():
        r = rates(times)
        share = f"**{r['share']:.0%}**" if r["share"] >= LEAST_SHARE else f"{r['share']:.0%}"
        cells = [f"{times['files']}", f"{times['bytes'] / record['tokens']:,.1f}", f"{r['write']:,.0f}"]
        cells += [f"{r['sequential']:,.0f}", f"{r['shuffled']:,.0f}", share, f"{r['first_ms']:.2f}"]
        rows.append([name + (" (checks)" if times["checks"] else ""), *cells])
    exact = 2 * record["paths"] * record["hidden"]
    return [
        f"### Formats: {record['records']} records, {record['tokens']:,} tokens of {record['paths']} x {record['hidden']} bf16 "
        f"({exact:,} bytes), all in the page cache",
        "",
        *markdown_table(header, rows),
        "",
        f"Medians of {record['rounds']} rounds; share: shuffled records against a plain sequential read of the same files, "
        f"bold from {LEAST_SHARE:.0%} on. Writing is into the page cache. A record counts as read when XXH3 has gone over its "
        "states, which is this cache's check and an extra pass elsewhere; first record: by a reader that opens the store.",
    ]
