"""What replay of a document costs beside the matrix products of drafting from all its positions.

    python -m src.bench.replay --out experiments/<date>-bench-replay

The drafter, the document and the vocabulary are those of the training step's bench (src/bench/shapes.py); every position is
an anchor, T = 0. The products are the forward ones of src/bench/flops.py, each at its own measured rate, timed in turn with
replay; all times are of the processor (time.process_time), so use one thread. Writes replay.md and replay.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from src.bench.flops import Product, products
from src.bench.own_step import TORCH_DTYPES, build
from src.bench.peak import product_rates
from src.bench.shapes import DTYPES, SHAPES, Case, StepShape
from src.decode.replay import replay
from src.drafter.cpu import fast_fp32_products, keep_freed_memory
from src.entry import runs_dir
from src.lit.record import environment_record, script_command, write_json
from src.report.tables import markdown_table

BAR = 1.5  # replay's time, times that of its products, at most


def replayed(shape: StepShape) -> StepShape:
    """With an anchor at every position that ``products`` allows one."""
    return replace(shape, num_anchors=shape.num_tokens - shape.block_size - 1)


def forward_products(case: Case) -> list[Product]:
    """Of drafting and reading the LM head, without a teacher."""
    drafted = [p for p in products(case) if p.name != "teacher's LM head"]
    return [replace(p, parts=("forward",), flops=p.flops // len(p.parts)) for p in drafted]


def measure(shape: StepShape, dtype: str, rounds: int, rate_s: float) -> dict:
    """Medians over ``rounds``: ``replay_s``, ``matmul_s`` with each product at its own rate, their ``ratio`` round by round,
    ``peak_ratio`` where all products ran at the rate of the fastest; and ``gflop``."""
    case = Case(replayed(shape), dtype, "own")
    setup, wanted = build(case), forward_products(case)
    setup.states.loss_mask[:, 0] = False  # replay wants a prompt
    flops = sum(p.flops for p in wanted)
    drafter, replay_s, matmul_s, peak_s = setup.drafter.eval(), [], [], []
    for number in range(rounds + 1):
        started = time.process_time()
        with fast_fp32_products():
            replay(drafter, setup.states, setup.heads, temperature=0.0)
        taken = time.process_time() - started
        rates = {r["name"]: r["flops_per_s"] for r in product_rates(wanted, TORCH_DTYPES[dtype], rate_s)}
        if number > 0:  # the first one compiles
            replay_s.append(taken)
            matmul_s.append(sum(p.flops / rates[p.name] for p in wanted))
            peak_s.append(flops / max(rates.values()))
    return {
        "shape": shape.name,
        "dtype": dtype,
        "anchors": case.shape.num_anchors,
        "gflop": flops / 1e9,
        "replay_s": statistics.median(replay_s),
        "matmul_s": statistics.median(matmul_s),
        "ratio": statistics.median(r / m for r, m in zip(replay_s, matmul_s, strict=True)),
        "peak_ratio": statistics.median(r / m for r, m in zip(replay_s, peak_s, strict=True)),
    }


def markdown(rows: Sequence[dict]) -> str:
    cells = [
        [
            *(r["shape"], r["dtype"], str(r["anchors"]), f"{r['gflop']:.1f}"),
            *(f"{1e3 * r['replay_s']:.0f}", f"{1e3 * r['matmul_s']:.0f}", f"{r['peak_ratio']:.2f}", f"{r['ratio']:.2f}"),
            "met" if r["ratio"] <= BAR else "**not met**",
        ]
        for r in rows
    ]
    header = ["Shape", "dtype", "anchors", "GFLOP", "replay, ms", "its products, ms"]
    header += ["replay / FLOPs at peak", "replay / products", f"at most {BAR}"]
    return "\n".join(markdown_table(header, cells)) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m src.bench.replay", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=runs_dir() / "bench-replay")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    cases = [(shape, dtype) for shape in (SHAPES[0], SHAPES[2]) for dtype in DTYPES]
    rows = [measure(*case, options.rounds, 0.02) for case in tqdm(cases, desc="replay", unit="case", mininterval=2)]
    write_json(options.out / "replay.json", {"rows": rows, **environment_record(script_command("src.bench.replay", arguments))})
    (options.out / "replay.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
