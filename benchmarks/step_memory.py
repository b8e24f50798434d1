"""The planner's memory model (planning/step_memory.py) against measured peaks of real training steps.

    python -m benchmarks.step_memory

Each case is a process of its own (benchmarks/own_step.py): resident memory at its largest, less what imports take, beside the
model's sum for the same sizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from tqdm import tqdm

from benchmarks.duel import Terms, duel
from benchmarks.own_step import drafter_config, meta_heads
from benchmarks.result import environment, option_parser, write_result
from benchmarks.shapes import DTYPES, SHAPES, Case, StepShape
from benchmarks.step import own_command
from hyperdflash.drafting.conditioning import PreHcHead
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.objectives.sweep import ROWS, SLICE_BYTES
from hyperdflash.planning.step_memory import StepMemory, StepSizes, step_memory
from hyperdflash.report.tables import markdown_table

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

RUNTIME_BYTES = 48 << 20  # oneDNN's compiled kernels and scratch, and what the allocator keeps


def predicted(case: Case) -> StepMemory:
    """Of a worker: no optimizer, one batch, everything in the case's dtype, the CPU's slices of the vocabulary."""
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
        weight_bytes=size,
        flow_bytes=size,
        compute_bytes=size,
        state_bytes=size,
        batches_held=1,
        loss_states=ROWS["cpu"],
        loss_slice_bytes=SLICE_BYTES["cpu"],
        runtime_bytes=RUNTIME_BYTES,
        gate_tokens=0,
    )
    return step_memory(config, sizes)


def compare(shapes: Sequence[StepShape], terms: Terms, dtypes: Sequence[str] = DTYPES) -> list[dict]:
    """A row a case: ``measured`` and ``predicted`` bytes, ``parts`` of the latter."""
    rows = []
    cases = [Case(shape, dtype, "own") for shape in shapes for dtype in dtypes]
    for case in tqdm(cases, desc="step memory", unit="case"):
        own = duel(case, {"own": own_command()}, terms)["own"]
        if own.error:
            raise SystemExit(f"error: {case.shape.name} in {case.dtype}: {own.error}")
        rows.append(row_of(case, own.peak_bytes - own.imports_bytes))
    return rows


def row_of(case: Case, measured: int) -> dict:
    model = predicted(case)
    row = {"shape": case.shape.name, "dtype": case.dtype, "measured": measured, "predicted": model.total}
    return {**row, "parts": asdict(model)}


def markdown(rows: Sequence[dict]) -> str:
    """MB and the ratio predicted / measured."""
    cells = [
        [
            r["shape"],
            r["dtype"],
            f"{r['measured'] / 1e6:.0f}",
            f"{r['predicted'] / 1e6:.0f}",
            f"{r['predicted'] / r['measured']:.2f}",
        ]
        for r in rows
    ]
    return "\n".join(markdown_table(["Shape", "dtype", "measured, MB", "model, MB", "model / measured"], cells)) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("step_memory", __doc__)
    parser.add_argument("--render", action="store_true", help="today's model beside the measurements that --out has")
    options = parser.parse_args(arguments)
    measured_in = environment("step_memory", arguments)
    if options.render:
        measured = json.loads((options.out / "step_memory.json").read_text())["rows"]
        shapes = {shape.name: shape for shape in CASES}
        rows = [row_of(Case(shapes[row["shape"]], row["dtype"], "own"), row["measured"]) for row in measured]
    else:
        rows = compare(CASES, Terms(rounds=2, warm_up=1))
    write_result(options.out, "step_memory", {"rows": rows}, markdown(rows).splitlines(), measured_in)


if __name__ == "__main__":
    main()
