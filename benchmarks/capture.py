"""Measures the cost of writing in a capture, and the wait of training for its first batch.

    python -m benchmarks.capture

Each round takes in turn, each into an empty directory: the forwards of a capture alone, the capture (a thread writes during
the next forward), and a capture that writes every shard before the next forward. There are two producers: the target on this
machine's CPU, which shares its cores with the writer, and a stand-in for a target on a device, which returns states of the
real target's size after the time of a forward.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.result import environment, option_parser, write_result
from hyperdflash.contracts import Document
from hyperdflash.report.tables import markdown_table
from hyperdflash.states.capture import capture, write_taps
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.modes import Disk, Off, Offline, Stream
from hyperdflash.states.readers import ShardedStates
from hyperdflash.states.store import StateStore, collate, make_shards
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess, Producer
from hyperdflash.training.epoch_plan import TrainingOrder

WAYS = ("forwards alone", "written beside", "written between")
PER_SHARD = 16
BATCH = 16
DEVICE_RATE = 4000.0


class Device:
    """A Producer that leaves the host idle: ``tokens_per_s`` of states [N, M, D] in bf16, always the same numbers."""

    fingerprint = "stand-in"
    where = "nowhere"

    def __init__(self, tokens_per_s: float, num_paths: int, hidden_size: int, largest: int):
        self.tokens_per_s = tokens_per_s
        generator = torch.Generator().manual_seed(0)
        self.numbers = torch.randn(largest, num_paths, hidden_size, generator=generator).bfloat16()

    def states(self, sequences: Sequence[Tensor], layer_ids: Sequence[int] = ()) -> dict[int | None, Tensor]:
        tokens = sum(map(len, sequences))
        time.sleep(tokens / self.tokens_per_s)
        return {tap: self.numbers[:tokens] for tap in (None, *layer_ids)}


def make_documents(count: int, mean: int, vocab_size: int) -> list[Document]:
    """Random tokens, a quarter to seven quarters of ``mean`` a document."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(mean // 4, 7 * mean // 4 + 1, (count,), generator=generator).tolist()
    tokens = [torch.randint(8, vocab_size, (length,), generator=generator) for length in lengths]
    return [Document(f"document-{i}", "code", ids, torch.ones(len(ids), dtype=torch.bool)) for i, ids in enumerate(tokens)]


def once(way: str, documents: Sequence[Document], key: CacheKey, producer: Producer, directory: Path) -> tuple[float, int]:
    """(seconds, bytes on disk) of one capture of everything."""
    store = StateStore(directory, key)
    started = time.perf_counter()
    if way == "written beside":
        capture(make_shards(documents, PER_SHARD), store, lambda: producer, progress=False)
    else:
        for shard in make_shards(documents, PER_SHARD):
            states = producer.states(shard.sequences)
            if way == "written between":
                write_taps(store, shard, states)
    seconds = time.perf_counter() - started
    return seconds, sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def writing(name: str, documents: Sequence[Document], key: CacheKey, producer: Producer, rounds: int, scratch: Path) -> dict:
    """Seconds of each way in each round; slow-downs are medians of the rounds' own ratios."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    written = 0
    with tqdm(total=(rounds + 1) * len(WAYS), desc=f"capture, {name}", mininterval=2) as bar:
        for number in range(rounds + 1):
            for way in WAYS:
                with emptied(scratch / "capture") as directory:
                    took, size = once(way, documents, key, producer, directory)
                written = max(written, size)
                if number:  # the first round warms up
                    seconds[way].append(took)
                bar.update()
    tokens = sum(len(document.input_ids) for document in documents)
    slower = {
        way: statistics.median(a / b - 1 for a, b in zip(seconds[way], seconds[WAYS[0]], strict=True)) for way in WAYS[1:]
    }
    return {"producer": name, "tokens": tokens, "bytes": written, "seconds": seconds, "slower": slower}


def first_batches(documents: Sequence[Document], key: CacheKey, producer: Producer, rounds: int, scratch: Path) -> dict:
    """Mode -> seconds of each round from nothing to the first batch of a training data set, the target already loaded."""
    with emptied(scratch / "first") as directory:
        settings = {"directory": str(directory / "disk"), "dtype": key.dtype, "documents_per_shard": PER_SHARD}
        streamed = {"budget_gb": 100, "wait_s": 60, "in_process": True}
        modes = {
            "disk, filled": Disk(**settings),
            "offline": Offline(**settings),
            "off": Off(**settings),
            "stream, empty": Stream(**{**settings, "directory": str(directory / "stream")}, **streamed),
        }
        shards = make_shards(documents, PER_SHARD)
        capture(shards, modes["disk, filled"].open(key), lambda: producer, progress=False)
        seconds: dict[str, list[float]] = {name: [] for name in modes}
        for _ in range(rounds):
            for name, mode in modes.items():
                shutil.rmtree(directory / "stream", ignore_errors=True)
                started = time.perf_counter()
                data = mode.states(shards, mode.open(key), lambda: producer, name="bench")
                first_batch(data)
                seconds[name].append(time.perf_counter() - started)
                del data
    return seconds


def first_batch(data: ShardedStates) -> None:
    order = TrainingOrder(data.lengths, batch_size=BATCH, epochs=1, seed=0)
    data.prefetch(order.shards_from(0), order.window)
    collate([data[index] for index in order.batch(0)])


@contextmanager
def emptied(directory: Path) -> Iterator[Path]:
    """``directory``, new before and gone after."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    yield directory
    shutil.rmtree(directory)


def measure(options: argparse.Namespace) -> dict:
    """What `main` takes as options, but ``out``; ``device_rate`` may be left out."""
    torch.set_num_threads(options.threads)
    target = load_target(path=options.target, dtype="fp32", attention="windowed", experts="dense")
    own = make_documents(options.records, options.tokens, target.model.config.vocab_size)
    sizes = {"num_paths": target.heads.num_paths, "hidden_size": target.heads.hidden_size}
    key = CacheKey(target=target.fingerprint, target_dtype="fp32", dtype="bf16", **sizes)
    device_sizes = {"num_paths": options.paths, "hidden_size": options.hidden}
    rate = getattr(options, "device_rate", DEVICE_RATE)
    largest = max(shard.num_tokens for shard in make_shards(own, PER_SHARD))
    device_key = CacheKey(target=Device.fingerprint, target_dtype="bf16", dtype="bf16", **device_sizes)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        cases: list[tuple[str, CacheKey, Callable[[], Producer]]] = [
            (f"{options.target} on {options.threads} CPU threads", key, lambda: InProcess(target)),
            (f"a device of {rate:,.0f} tokens/s", device_key, lambda: Device(rate, **device_sizes, largest=largest)),
        ]
        found = [writing(name, own, case_key, make(), options.rounds, scratch) for name, case_key, make in cases]
        first = first_batches(own, key, InProcess(target), options.rounds, scratch)
    shape = {"records": options.records, "shards": len(make_shards(own, PER_SHARD)), "batch": BATCH}
    return {**shape, "writing": found, "first_batch": first}


def table(record: dict) -> list[str]:
    """Lines of Markdown: medians over the rounds."""
    heads = ["producer", "MB written", f"{WAYS[0]}, tok/s", *(head for way in WAYS[1:] for head in (f"{way}, tok/s", "slower"))]
    rows = []
    for row in record["writing"]:
        rates = [f"{row['tokens'] / statistics.median(row['seconds'][way]):,.0f}" for way in WAYS]
        slower = [f"{100 * row['slower'][way]:.1f}%" for way in WAYS[1:]]
        rows.append([row["producer"], f"{row['bytes'] / 1e6:,.1f}", rates[0], rates[1], slower[0], rates[2], slower[1]])
    first = [[name, f"{1e3 * statistics.median(taken):,.1f}"] for name, taken in record["first_batch"].items()]
    return [
        f"### Capture of {record['records']} records in {record['shards']} shards",
        "",
        *markdown_table(heads, rows),
        "",
        f"### Time to the first batch of {record['batch']}",
        "",
        *markdown_table(["cache", "ms"], first),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("capture", __doc__, rounds=7, threads=1)
    parser.add_argument("--records", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=64, help="mean length of a record")
    parser.add_argument("--paths", type=int, default=4, help="of the device's target")
    parser.add_argument("--hidden", type=int, default=4096, help="of the device's target")
    parser.add_argument("--device-rate", type=float, default=DEVICE_RATE, help="tokens/s of the device's forwards")
    parser.add_argument("--target", default="assets/tiny")
    parser.add_argument("--scratch", type=Path, help="where the files go meanwhile; the system's temporary directory")
    options = parser.parse_args(arguments)
    measured_in = environment("capture", arguments)
    record = measure(options)
    write_result(options.out, "capture", record, table(record), measured_in)


if __name__ == "__main__":
    main()
