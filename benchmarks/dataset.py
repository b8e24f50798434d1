"""Measures what opening a dataset costs each rank: seconds and peak memory of a new process.

    python -m benchmarks.dataset --documents 300000

1. write    synthetic documents in shards of 16, as a capture writes them                            (states/dataset.py)
2. open     in a new process: the index of both splits, the reader, the order of training, the documents of the first batch
3. compare  with the limits below, and with the size of the index on disk
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.result import memory_bytes, option_parser, run, seconds, verdict
from hyperdflash.contracts import Document
from hyperdflash.states.dataset import open_dataset, write_dataset
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.readers import ShardedStates
from hyperdflash.states.store import make_shards
from hyperdflash.training.epoch_plan import TrainingOrder

LIMITS = {"open_s": 5.0, "peak_mb": 300.0}
PER_SHARD, BATCH, VALIDATION = 16, 16, 1000
KEY = CacheKey(target="synthetic", target_dtype="bf16", num_paths=4, hidden_size=4096, dtype="fp8")


def synthetic(count: int, tokens: int, prefix: str) -> list[Document]:
    """Returns documents of ``tokens`` / 2 to 3/2 ``tokens`` random ids; the second half is supervised."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(tokens // 2, tokens * 3 // 2, (count,), generator=generator).tolist()
    made = []
    for number, length in enumerate(tqdm(lengths, desc=f"{prefix} documents", mininterval=2)):
        ids = torch.randint(0, 129_280, (length,), generator=generator)
        made.append(Document(f"{prefix}/{number:08d}", "chat", ids, torch.arange(length) >= length // 2))
    return made


def opened(directory: Path) -> dict:
    """Opens everything that a rank holds before its first step, but states and drafter; call it in a new process."""
    before, started = memory_bytes("VmHWM"), time.perf_counter()
    dataset = open_dataset(directory)
    data = {name: ShardedStates(shards) for name, shards in dataset.shards.items()}
    open_s = time.perf_counter() - started
    order = TrainingOrder(data["train"].lengths, batch_size=BATCH, epochs=1, seed=0)
    batch = [data["train"].document(index) for index in order.batch(0)]
    assert batch and all(bool(document.loss_mask.any()) for document in batch)
    first_s = time.perf_counter() - started
    memory = {"imports_mb": before / 1.024e6, "peak_mb": memory_bytes("VmHWM") / 1.024e6}
    return {"open_s": open_s, "first_batch_s": first_s, **memory}


def measure(options: Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "dataset"
        sizes = {"train": options.documents, "validation": VALIDATION}
        documents = {split: synthetic(count, options.tokens, split) for split, count in sizes.items()}
        shards = {split: make_shards(own, PER_SHARD) for split, own in documents.items()}
        facts = {"mask_token_id": 0, "rows": {}, "source_files": {}}
        write_s = seconds(lambda: write_dataset(directory, shards, KEY, facts))
        command = [sys.executable, "-m", "benchmarks.dataset", "--open", str(directory)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        size = sum(path.stat().st_size for path in directory.iterdir()) / 1e6
        tokens = sum(shard.num_tokens for shard in open_dataset(directory).shards["train"])
    return {"documents": options.documents, "tokens": tokens, "index_mb": size, "write_s": write_s, **found}


def blocks(record: dict) -> list:
    from hyperdflash.report.tables import Table  # not in a rank, whose memory is measured

    rows = []
    for name, text in (
        ("open_s", "open both splits, s"),
        ("first_batch_s", "and the documents of the first batch, s"),
        ("imports_mb", "peak memory after the imports, MB"),
        ("peak_mb", "peak memory, MB"),
    ):
        limit = LIMITS.get(name)
        bound = ["", ""] if limit is None else [f"{limit:.0f}", verdict(record[name] <= limit)]
        rows.append([text, f"{record[name]:.2f}", *bound])
    size = f"{record['documents']:,} documents, {record['tokens']:,} tokens, {record['index_mb']:,.0f} MB of index"
    return [f"A dataset of {size}, in a new process.", Table(["", "measured", "at most", ""], rows)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("dataset", __doc__)
    parser.add_argument("--documents", type=int, default=300_000)
    parser.add_argument("--tokens", type=int, default=256, help="mean length of a document")
    parser.add_argument("--open", type=Path, help="open this dataset and print its costs (for the new process)")
    if directory := parser.parse_args(arguments).open:
        print(json.dumps(opened(directory)))
    else:
        run(parser, measure, blocks, arguments)


if __name__ == "__main__":
    main()
