"""Part "codecs" of the cache's benchmark: bytes, time and error of each codec.

Rates are at the paper's size through the store. Errors are on the tiny target's states of held-out prompts at every position:
of the states, of the teacher's probabilities softmax(lm_head(norm(mean over paths))), and of the target's own, which reads the
same states through hc_head.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cache_rates import DOCUMENTS_PER_SHARD, make_records, state_source
from hyperdflash.data.chat import encode_prompt
from hyperdflash.data.prompts import HeldoutPrompts
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.report.tables import markdown_table
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.store import StateStore, make_shards
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess


def measure(options: Namespace) -> dict:
    torch.set_num_threads(options.threads)
    record = {"paths": options.paths, "hidden": options.hidden, "rounds": options.rounds, "target": options.target}
    return {**record, "rates": codec_rates(options), **codec_errors(options)}


def codec_rates(options: Namespace) -> dict:
    """Returns per codec the seconds of each round for writing and reading every record of fp32 states, and the tokens."""
    shards = make_shards(make_records(2 * DOCUMENTS_PER_SHARD, options.tokens), DOCUMENTS_PER_SHARD)
    drawn = state_source(shards, options.paths, options.hidden)
    states = {shard.name: drawn(shard).float() for shard in shards}
    found = {name: {"write_s": [], "read_s": [], "tokens": sum(shard.num_tokens for shard in shards)} for name in CODECS}
    with TemporaryDirectory(dir=options.scratch) as scratch:
        stores = {
            name: StateStore(Path(scratch) / name, CacheKey("bench", "fp32", options.paths, options.hidden, name, "", "", 0))
            for name in CODECS
        }
        for _ in tqdm(range(options.rounds + 1), desc="codec rates", unit="round", mininterval=2):  # the first warms up
            for name, store in stores.items():
                started = time.perf_counter()
                for shard in shards:
                    store.write(shard, states[shard.name])
                written = time.perf_counter()
                for shard in shards:
                    for index in range(len(shard.documents)):
                        store.read(shard, index)
                found[name]["write_s"].append(written - started)
                found[name]["read_s"].append(time.perf_counter() - written)
    for times in found.values():
        times["write_s"], times["read_s"] = times["write_s"][1:], times["read_s"][1:]
    return found


@torch.no_grad()
def codec_errors(options: Namespace) -> dict:
    """Returns per codec the errors of the states and of their probabilities, over ``options.prompts`` prompts per domain."""
    target = load_target(path=options.target, dtype="fp32", attention="windowed", experts="dense")
    tokenizer = load_tokenizer(options.target)
    prompts = HeldoutPrompts(per_domain=options.prompts, max_length=512, max_new_tokens=64).conversations()
    sequences = [torch.tensor(encode_prompt(prompt, tokenizer)) for prompt in prompts]
    sums = {name: {"error": 0.0, "norm": 0.0, "mean_pool": [], "hc_head": [], "same_top": 0} for name in CODECS}
    tokens = 0
    for batch in tqdm(_batches(sequences, 32), desc="codec errors", unit="batch", mininterval=2):
        exact = InProcess(target).states(batch)[None]
        tokens += len(exact)
        for name, codec in CODECS.items():
            decoded = codec.decode(codec.encode(exact)).float()
            sums[name]["error"] += float((decoded - exact).double().square().sum())
            sums[name]["norm"] += float(exact.double().square().sum())
            for teacher in ("mean_pool", "hc_head"):
                sums[name][teacher].append(divergence(target.heads, exact, decoded, teacher))
            sums[name]["same_top"] += int((_top(target.heads, exact) == _top(target.heads, decoded)).sum())
    errors = {}
    for name, found in sums.items():
        kl = {teacher: torch.cat(found[teacher]) for teacher in ("mean_pool", "hc_head")}
        errors[name] = {
            "states": (found["error"] / found["norm"]) ** 0.5,
            **{f"kl_{teacher}": float(values.mean()) for teacher, values in kl.items()},
            **{f"kl_{teacher}_worst_permille": float(values.quantile(0.999)) for teacher, values in kl.items()},
            "same_top": found["same_top"] / tokens,
        }
    return {"prompts": len(sequences), "tokens": tokens, "errors": errors}


def divergence(heads: TargetHeads, exact: Tensor, decoded: Tensor, teacher: str) -> Tensor:
    """Returns KL(p of exact states || p of decoded states) in nats: two [N, M, D] -> [N]."""
    log_p, log_q = (heads.logits(heads.collapse(x[None], teacher))[0].double().log_softmax(-1) for x in (exact, decoded))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _top(heads: TargetHeads, states: Tensor) -> Tensor:
    return heads.logits(heads.collapse(states[None]))[0].argmax(-1)


def _batches(sequences: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    ordered = sorted(sequences, key=len)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def table(record: dict) -> list[str]:
    rows = []
    for name, times in record["rates"].items():
        size = CODECS[name].bytes_per_token(record["paths"], record["hidden"])
        cells = [f"{size:,}"]
        for key in ("write_s", "read_s"):
            rate = times["tokens"] / statistics.median(times[key])
            cells.append(f"{rate:,.0f} ({rate * size / 1e6:,.0f})")
        e = record["errors"][name]
        cells += [f"{e['states']:.2%}", f"{e['kl_mean_pool']:.1e}", f"{e['kl_mean_pool_worst_permille']:.1e}"]
        rows.append([name, *cells, f"{e['kl_hc_head']:.1e}", f"{e['same_top']:.2%}"])
    header = ["cache.dtype", "bytes per token", "write tokens/s (MB/s)", "read tokens/s (MB/s)", "error of states"]
    header += ["KL teacher", "its worst 1/1000", "KL target", "same greedy token"]
    return [
        f"### Codecs: {record['paths']} x {record['hidden']} per token",
        "",
        *markdown_table(header, rows),
        "",
        f"Rates: medians of {record['rounds']} rounds from fp32 states, one process, page cache. Errors: {record['tokens']:,} "
        f"positions of {record['prompts']} held-out prompts on {record['target']}, against its fp32 states; of states: "
        "|decoded - exact| / |exact|; KL in nats of the probabilities that the exact and the decoded states give, mean over "
        "positions: teacher through the mean of the paths, target through hc_head.",
    ]
