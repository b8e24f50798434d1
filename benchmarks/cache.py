"""Measures the cache of target states: rates of reading and writing beside a plain read of its files, and the codecs' errors.

    make bench-cache
    python -m benchmarks.cache codecs           # one part; the other part of results/cache.json stays unchanged

rates    Records of the paper's size: token ids [T], a loss mask [T] and states [T, M, D] bfloat16. In a round the cache is
         written; then, with the files in the page cache, its files are read sequentially, and all records in a random order by
         a new reader, which verifies every byte. The sequential read fills one 4 MiB buffer, which stays in the processor's
         cache, and does not look at the bytes
codecs   On the tiny target's states of held-out prompts at every position: errors of the states, of the teacher's probabilities
         softmax(lm_head(norm(mean over paths))), and of the target's own, which reads the same states through hc_head

Rates on a busy machine are meaningless, so each part's record has the load before it.
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
from torch import Tensor
from tqdm import tqdm

from benchmarks.result import option_parser, run_parts, seconds
from hyperdflash.contracts import Document
from hyperdflash.data.chat import encode_prompt
from hyperdflash.data.prompts import HeldoutPrompts
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.report.tables import Block, Table
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.store import StateStore, make_shards
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess

DOCUMENTS_PER_SHARD = 16
LEAST_SHARE = 0.8  # of a plain sequential read that shuffled records reach
TEACHERS = ("mean_pool", "hc_head")


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


@torch.no_grad()
def measure_codecs(options: Namespace) -> dict:
    """Returns per codec the errors of the states and of their probabilities, over ``options.prompts`` prompts per domain."""
    torch.set_num_threads(options.threads)
    target = load_target(path=options.target, dtype="fp32", attention="windowed", experts="dense")
    tokenizer = load_tokenizer(options.target)
    prompts = HeldoutPrompts(per_domain=options.prompts, max_length=512, max_new_tokens=64).conversations()
    sequences = sorted((torch.tensor(encode_prompt(prompt, tokenizer)) for prompt in prompts), key=len)
    sums = {name: {"error": 0.0, "norm": 0.0, "same_top": 0, **{t: [] for t in TEACHERS}} for name in CODECS}
    tokens = 0
    for first in tqdm(range(0, len(sequences), 32), desc="codec errors", unit="batch", mininterval=2):
        exact = InProcess(target).states(sequences[first : first + 32])[None]
        tokens += len(exact)
        for name, codec in CODECS.items():
            decoded = codec.decode(codec.encode(exact)).float()
            sums[name]["error"] += float((decoded - exact).double().square().sum())
            sums[name]["norm"] += float(exact.double().square().sum())
            for teacher in TEACHERS:
                sums[name][teacher].append(divergence(target.heads, exact, decoded, teacher))
            sums[name]["same_top"] += int((_top(target.heads, exact) == _top(target.heads, decoded)).sum())
    errors = {}
    for name, found in sums.items():
        kl = {teacher: torch.cat(found[teacher]) for teacher in TEACHERS}
        errors[name] = {
            "states": (found["error"] / found["norm"]) ** 0.5,
            **{f"kl_{teacher}": float(values.mean()) for teacher, values in kl.items()},
            **{f"kl_{teacher}_worst_permille": float(values.quantile(0.999)) for teacher, values in kl.items()},
            "same_top": found["same_top"] / tokens,
        }
    return {"target": options.target, "prompts": len(sequences), "tokens": tokens, "errors": errors}


def divergence(heads: TargetHeads, exact: Tensor, decoded: Tensor, teacher: str) -> Tensor:
    """Returns KL(p of exact states || p of decoded states) in nats: two [N, M, D] -> [N]."""
    log_p, log_q = (heads.logits(heads.collapse(x[None], teacher))[0].double().log_softmax(-1) for x in (exact, decoded))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _top(heads: TargetHeads, states: Tensor) -> Tensor:
    return heads.logits(heads.collapse(states[None]))[0].argmax(-1)


def codec_blocks(record: dict) -> list[Block]:
    rows = []
    for name, e in record["errors"].items():
        cells = [f"{e['states']:.2%}", f"{e['kl_mean_pool']:.1e}", f"{e['kl_mean_pool_worst_permille']:.1e}"]
        rows.append([name, *cells, f"{e['kl_hc_head']:.1e}", f"{e['same_top']:.2%}"])
    header = ["cache.dtype", "error of states", "KL teacher", "its worst 1/1000", "KL target", "same greedy token"]
    return [
        "### Codecs",
        Table(header, rows),
        f"{record['tokens']:,} positions of {record['prompts']} held-out prompts on {record['target']}, against its fp32 "
        "states; of states: |decoded - exact| / |exact|; KL in nats of the probabilities that the exact and the decoded states "
        "give, mean over positions: teacher through the mean of the paths, target through hc_head.",
    ]


PARTS = {"rates": (measure_rates, rate_blocks), "codecs": (measure_codecs, codec_blocks)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("cache", __doc__, rounds=5, threads=1)
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="mean length of a record")
    parser.add_argument("--paths", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--target", default="assets/tiny", help="whose states the codecs encode")
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts of each domain, for the codecs")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files; by default the system's")
    run_parts(parser, PARTS, arguments)


if __name__ == "__main__":
    main()
