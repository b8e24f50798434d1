"""Measures the cache of target states: rates of reading and writing beside a plain read of its files.

    make bench-cache

Records have the paper's size: token ids [T], a loss mask [T] and states [T, M, D] bfloat16. In a round the cache is written;
then, with the files in the page cache, its files are read sequentially, and all records in a random order by a new reader,
which verifies every byte. The sequential read fills one 4 MiB buffer, which stays in the processor's cache, and does not look
at the bytes. Rates on a busy machine are meaningless, so the record has the load before it.
"""

from __future__ import annotations

import os
import shutil
import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from benchmarks.result import option_parser, run, seconds
from hyperdflash.contracts import Document
from hyperdflash.report.tables import Block, Table
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.store import StateStore, make_shards

DOCUMENTS_PER_SHARD = 16
LEAST_SHARE = 0.8  # of a plain sequential read that shuffled records reach


def make_records(count: int, mean_tokens: int, seed: int = 0) -> list[Document]:
    """Draws documents of log-normal lengths around ``mean_tokens``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.exp(0.6 * torch.randn(count, generator=generator) - 0.18) * mean_tokens
    lengths = [max(4, int(value)) for value in drawn]
    ids = [torch.randint(0, 129280, (length,), generator=generator) for length in lengths]
    return [Document(f"d{i}", "chat", own, torch.arange(len(own)) >= len(own) // 3) for i, own in enumerate(ids)]


def sequential(directory: Path, buffer: memoryview) -> None:
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def flush(directory: Path) -> None:
    """Writes dirty pages to the disk, so that the timed reads do not compete with them."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _each(action: Callable, arguments: Sequence[tuple]) -> None:
    for own in arguments:
        action(*own)


def measure_rates(options: Namespace) -> dict:
    """Returns the seconds of each round, and the bytes of all files."""
    torch.set_num_threads(options.threads)
    shards = make_shards(make_records(options.records, options.tokens), DOCUMENTS_PER_SHARD)
    shape, generator = (options.paths, options.hidden), torch.Generator().manual_seed(1)
    drawn = torch.randn(max(shard.num_tokens for shard in shards), *shape, generator=generator).bfloat16()
    places = [(shard, index) for shard in shards for index in range(len(shard.documents))]
    key, buffer = CacheKey("bench", "bf16", *shape, "bf16", "none", "none", 0), memoryview(bytearray(4 << 20))
    times: dict[str, list[float]] = {"write_s": [], "sequential_s": [], "shuffled_s": []}
    with TemporaryDirectory(dir=options.scratch) as scratch:
        directory = Path(scratch) / "store"
        for number in tqdm(range(options.rounds), desc="cache rates", unit="round", mininterval=2):
            order = torch.randperm(len(places), generator=torch.Generator().manual_seed(number)).tolist()
            write = StateStore(directory, key).write
            times["write_s"].append(seconds(partial(_each, write, [(shard, drawn[: shard.num_tokens]) for shard in shards])))
            flush(directory)
            sequential(directory, buffer)
            times["sequential_s"].append(seconds(lambda: sequential(directory, buffer)))
            reader = StateStore(directory, key)
            assert not any(reader.missing_of(shards, ()).values())
            times["shuffled_s"].append(seconds(partial(_each, reader.read, [places[i] for i in order])))
            files = [path for path in directory.rglob("*") if path.is_file()]
            sizes = {"bytes": sum(path.stat().st_size for path in files), "files": len(files)}
            shutil.rmtree(directory)
    counts = {"records": len(places), "tokens": sum(shard.num_tokens for shard in shards), "rounds": options.rounds}
    return {**counts, "paths": options.paths, "hidden": options.hidden, **sizes, **times}


def rates(record: dict) -> dict[str, float]:
    """Returns medians over the rounds: decimal MB/s, and the share of paired rounds."""
    size, names = record["bytes"], ("write", "sequential", "shuffled")
    found = {name: statistics.median(size / s for s in record[f"{name}_s"]) / 1e6 for name in names}
    pairs = zip(record["sequential_s"], record["shuffled_s"], strict=True)
    return {**found, "share": statistics.median(a / b for a, b in pairs)}


def rate_blocks(record: dict) -> list[Block]:
    found = rates(record)
    share = f"{found['share']:.0%}" + ("" if found["share"] >= LEAST_SHARE else " **not met**")
    cells = [f"{record['files']}", f"{record['bytes'] / record['tokens']:,.1f}"]
    cells += [*(f"{found[key]:,.0f}" for key in ("write", "sequential", "shuffled")), share]
    return [
        f"### Rates: {record['records']} records, {record['tokens']:,} tokens of {record['paths']} x {record['hidden']} bf16 "
        f"({2 * record['paths'] * record['hidden']:,} bytes), all in the page cache",
        Table(["files", "bytes per token", "write MB/s", "sequential MB/s", "shuffled MB/s", "share"], [cells]),
        f"Medians of {record['rounds']} rounds; share: shuffled records, every byte verified, against a plain sequential read "
        f"of the same files; threshold {LEAST_SHARE:.0%}.",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("cache", __doc__, rounds=5, threads=1)
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="mean length of a record")
    parser.add_argument("--paths", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--scratch", type=Path, help="folder for temporary files; by default the system's")
    run(parser, measure_rates, rate_blocks, arguments)


if __name__ == "__main__":
    main()
