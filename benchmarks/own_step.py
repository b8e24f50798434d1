"""Runs this project's training step in its own process: a JSON line in, a JSON line out (benchmarks/duel.py starts it).

    {"do": "build", "shape": {..}, "dtype": "bf16", "objective": "own", "threads": 2, "memory_bytes": ..}
    {"do": "step", "anchors": [..]}     forward and backward once -> seconds, loss, anchors, slots
    {"do": "memory"}                    -> peak_bytes and imports_bytes of this process

An answer {"error": ..} holds one line.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.result import memory_bytes
from benchmarks.shapes import Case, StepShape
from hyperdflash.contracts import TargetStates
from hyperdflash.drafting.anchors import BlockSampler, make_blocks
from hyperdflash.drafting.conditioning import PreHcHead
from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.drafter import Drafter
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.files import asset
from hyperdflash.numerics import fast_fp32_products, keep_freed_memory
from hyperdflash.objectives.cross_entropy import PositionWeighted
from hyperdflash.objectives.distillation import Distillation
from hyperdflash.objectives.objective import Objective
from hyperdflash.targets.adapter import adapter_of
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import read_config

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """The inputs of a step; ``states`` is one document."""

    drafter: Drafter
    heads: TargetHeads
    states: TargetStates
    sampler: BlockSampler
    objective: Objective
    generator: torch.Generator


def training_step(setup: Setup, anchors: list[int]) -> tuple[Tensor, Tensor]:
    """Computes what DraftingModule (training/module.py) computes: training_step and backward -> loss, supervised slots [S].

    Draws anchors as training does, then takes ``anchors``, so that both sides draft from the same positions.
    """
    states, size = setup.states, setup.drafter.num_slots + 1
    text = states.input_ids, states.loss_mask, states.lengths
    drawn = setup.sampler.sample(*text, size, setup.generator)
    blocks = make_blocks(*text, torch.tensor([anchors]), torch.ones_like(drawn.anchor_mask), size)
    with fast_fp32_products():
        slots = setup.drafter.slots(states, setup.heads, blocks.anchors, blocks.anchor_mask)
        logits = setup.drafter.head.logits(slots, setup.heads)
        sums = setup.objective.sums(logits, blocks, states.residual, setup.heads)
        loss = setup.objective.loss(sums)
        loss.backward()
    return loss.detach(), sums.slot_count


def drafter_config(shape: StepShape) -> DrafterConfig:
    """Returns the Qwen3-shaped drafter of a shape."""
    return DrafterConfig(
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        block_size=shape.block_size,
    )


def meta_heads(shape: StepShape, dtype: torch.dtype | None = None) -> TargetHeads:
    """Returns the heads of a target with the shape's sizes on the meta device."""
    config = read_config(asset("tiny"))
    config.vocab_size, config.hidden_size, config.hc_mult = shape.vocab_size, shape.hidden_size, shape.num_streams
    with torch.device("meta"):
        return TargetHeads(config, dtype=dtype)


def build(case: Case, seed: int = 0) -> Setup:
    """Builds random weights and states; benchmarks/peer_step.py draws the same document."""
    shape, dtype = case.shape, TORCH_DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, shape.vocab_size - 1, (1, shape.num_tokens), generator=generator)
    streams = torch.randn(1, shape.num_tokens, shape.num_streams * shape.hidden_size, generator=generator).to(dtype)

    heads = meta_heads(shape, dtype).to(torch.bfloat16).to_empty(device="cpu")  # as load_heads keeps the tables
    for parameter in heads.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    heads.hc_head.to(dtype)
    heads.norm.to(dtype)
    given = DrafterParts(conditioning=PreHcHead(), reducer=Fc(), heads=heads, mask_token_id=shape.vocab_size - 1)
    drafter = drafter_config(shape).build(given, generator).to(dtype)
    states = TargetStates(
        ids=("bench",),
        domains=("chat",),
        input_ids=input_ids,
        loss_mask=torch.ones_like(input_ids, dtype=torch.bool),
        lengths=torch.tensor([shape.num_tokens]),
        residual=streams.unflatten(-1, (shape.num_streams, shape.hidden_size)),
    )
    alpha = 1.0 if case.objective == "kl" else 0.15
    kl = Distillation(alpha=alpha, positions=case.num_taught, temperature=1.0, teacher="mean_pool")
    return Setup(
        drafter=drafter.train(),
        heads=heads,
        states=states,
        sampler=BlockSampler(num_anchors=shape.num_anchors),
        objective=Objective({"cross_entropy": PositionWeighted(gamma=4.0), "kl": kl}),
        generator=generator,
    )


class OwnStep:
    """Builds a case once and runs many steps."""

    def __init__(self, request: dict):
        torch.set_num_threads(request["threads"])
        keep_freed_memory()  # as training does
        self.setup = build(Case(StepShape(**request["shape"]), request["dtype"], request["objective"]))
        gc.freeze()  # so that the collection before every step is fast

    def step(self, anchors: list[int]) -> dict:
        self.setup.drafter.zero_grad(set_to_none=True)
        gc.collect()
        started = time.perf_counter()
        loss, slots = training_step(self.setup, anchors)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "loss": float(loss), "anchors": len(anchors), "slots": int(slots.sum())}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries out of the answers
    adapter_of("deepseek_v4")  # imported on first use; counts as an import, not as memory of a step
    imports_bytes, built = memory_bytes("VmRSS"), None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "build":
                limit = memory_bytes("VmSize") + request["memory_bytes"]
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                built = OwnStep(request)
                answer = {"versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}}
            elif request["do"] == "memory":
                answer = {"peak_bytes": memory_bytes("VmHWM"), "imports_bytes": imports_bytes}
            else:
                answer = built.step(request["anchors"])
        except (MemoryError, RuntimeError) as error:
            answer = {"error": (str(error) or type(error).__name__).splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
