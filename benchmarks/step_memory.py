"""Measures the peak memory of real training steps beside the planner's memory model (planning/step_memory.py).

    python -m benchmarks.step_memory

Each case has its own process (benchmarks/own_step.py): resident memory at its largest, less the memory of the imports, beside
the model's sum for the same sizes. The table is rendered by the model of the code at hand.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from benchmarks.duel import Terms, duel
from benchmarks.own_step import drafter_config, meta_heads
from benchmarks.result import option_parser, run
from benchmarks.shapes import DTYPES, SHAPES, Case, StepShape
from benchmarks.step import own_command
from hyperdflash.drafting.conditioning import PreHcHead
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.objectives.sweep import ROWS, SLICE_BYTES
from hyperdflash.planning.step_memory import StepSizes, step_memory
from hyperdflash.report.tables import Block, Table

BASE = replace(SHAPES[0], name="T2048 A128 V32k", num_tokens=2048, num_anchors=128)
CASES = (
    SHAPES[1],
    SHAPES[2],
    BASE,
    replace(BASE, name="T8192 A128 V32k", num_tokens=8192),
    replace(BASE, name="T2048 A512 V32k", num_anchors=512),
    replace(BASE, name="D1024", hidden_size=1024, intermediate_size=4096),
    replace(BASE, name="8 layers", num_layers=8),
)

RUNTIME_BYTES = 48 << 20  # oneDNN's compiled kernels and scratch, and memory that the allocator keeps


def predicted(case: Case) -> dict[str, float]:
    """Returns the model's bytes by part: no optimizer, one batch, everything in the case's dtype, the CPU's slices of the
    vocabulary."""
    shape, size = case.shape, {"fp32": 4, "bf16": 2}[case.dtype]
    config = drafter_config(shape)
    drafter = config.build(DrafterParts(conditioning=PreHcHead(), reducer=Fc(), heads=meta_heads(shape), mask_token_id=0))
    sizes = StepSizes(
        documents=1,
        tokens=shape.num_tokens,
        anchors=shape.num_anchors,
        vocab_size=shape.vocab_size,
        target_width=shape.hidden_size,
        num_paths=shape.num_streams,
        tapped=shape.num_streams,
        trainable=sum(p.numel() for p in drafter.parameters()),
        num_taught=2,
        optimizer_bytes=0,
        **dict.fromkeys(("weight_bytes", "flow_bytes", "compute_bytes", "state_bytes"), size),
        batches_held=1,
        loss_states=ROWS["cpu"],
        loss_slice_bytes=SLICE_BYTES["cpu"],
        runtime_bytes=RUNTIME_BYTES,
        gate_tokens=0,
    )
    return step_memory(config, sizes)


def measure(shapes: Sequence[StepShape], terms: Terms, dtypes: Sequence[str] = DTYPES) -> dict:
    """Returns a row per case: the ``measured`` bytes."""
    rows, cases = [], [Case(shape, dtype, "own") for shape in shapes for dtype in dtypes]
    for case in tqdm(cases, desc="step memory", unit="case"):
        own = duel(case, {"own": own_command()}, terms)["own"]
        if own.error:
            raise SystemExit(f"error: {case.shape.name} in {case.dtype}: {own.error}")
        rows.append({"shape": case.shape.name, "dtype": case.dtype, "measured": own.peak_bytes - own.imports_bytes})
    return {"rows": rows}


def blocks(record: dict) -> list[Block]:
    """Returns MB and the ratio model / measured."""
    shapes, cells = {shape.name: shape for shape in (*SHAPES, *CASES)}, []
    for row in record["rows"]:
        model = sum(predicted(Case(shapes[row["shape"]], row["dtype"], "own")).values())
        megabytes = (f"{value / 1e6:.0f}" for value in (row["measured"], model))
        cells.append([row["shape"], row["dtype"], *megabytes, f"{model / row['measured']:.2f}"])
    return [Table(["Shape", "dtype", "measured, MB", "model, MB", "model / measured"], cells)]


def main(arguments: Sequence[str] | None = None) -> None:
    def measured(_: Namespace) -> dict:
        return measure(CASES, Terms(rounds=2, warm_up=1))

    run(option_parser("step_memory", __doc__), measured, blocks, arguments)


if __name__ == "__main__":
    main()
