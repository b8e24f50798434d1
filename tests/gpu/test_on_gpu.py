"""What a person with a GPU runs first: python -m pytest -m gpu"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV4Config

from hyperdflash.contracts import TargetStates
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.anchors import BlockSampler
from hyperdflash.drafting.conditioning import PreHcHead
from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.objectives.cross_entropy import PositionWeighted
from hyperdflash.objectives.distillation import Distillation
from hyperdflash.objectives.objective import Objective
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.training.datamodule import on_tensors

ROOT = Path(__file__).resolve().parents[2]
KL = Distillation(alpha=0.15, positions=2, temperature=1.0, teacher="mean_pool")
OBJECTIVE = Objective({"cross_entropy": PositionWeighted(gamma=4.0), "kl": KL})
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def parts():
    """Drafter, heads and 2 documents over a vocabulary of 8, so that some drafts are accepted by chance."""
    draw = torch.Generator().manual_seed(0)
    heads = TargetHeads(DeepseekV4Config(hidden_size=64, vocab_size=8, hc_mult=4, num_hidden_layers=3)).requires_grad_(False)
    for parameter in heads.parameters():
        parameter.data.normal_(0.0, 0.3, generator=draw)
    heads.norm.weight.data.fill_(1.0)
    sizes = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, block_size=7)
    drafter = DrafterConfig(**sizes, initializer_range=0.2).build(
        DrafterParts(conditioning=PreHcHead(), reducer=HcGate(), heads=heads, mask_token_id=2), draw
    )
    lengths = torch.tensor([200, 130])
    positions = torch.arange(200)
    states = TargetStates(
        ids=("a", "b"),
        domains=("math", "code"),
        input_ids=torch.randint(3, 8, (2, 200), generator=draw),
        loss_mask=(positions >= 8) & (positions < lengths[:, None]),
        lengths=lengths,
        residual=torch.randn(2, 200, 4, 64, generator=draw).bfloat16(),
    )
    return drafter, heads, states


def on_cuda(batch):
    return on_tensors(batch, lambda tensor: tensor.cuda())


def step(drafter, heads, states, blocks) -> tuple[float, torch.Tensor]:
    """The loss, and all gradients as one vector in fp64 on the CPU."""
    logits = drafter.head.logits(drafter.slots(states, heads, blocks.anchors, blocks.anchor_mask), heads)
    loss = OBJECTIVE.loss(OBJECTIVE.sums(logits, blocks, states.residual, heads))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double().cpu() for p in drafter.parameters() if p.requires_grad])


def test_a_step_in_bf16_with_flex_attention_is_that_of_the_cpu(parts):
    drafter, heads, states = parts
    sampler = BlockSampler(num_anchors=32)
    blocks = sampler.sample(states.input_ids, states.loss_mask, states.lengths, 7, torch.Generator().manual_seed(1))
    there = deepcopy(drafter).cuda(), deepcopy(heads).cuda(), on_cuda(states), on_cuda(blocks)
    loss, gradient = step(drafter, heads, states, blocks)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found, found_gradient = step(*there)
    assert found == pytest.approx(loss, rel=2e-2)
    assert torch.nn.functional.cosine_similarity(gradient, found_gradient, dim=0) > 0.99
    assert found_gradient.norm() == pytest.approx(gradient.norm(), rel=5e-2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_gives_the_rounds_of_the_cpu(parts, temperature):
    drafter, heads, states = parts
    own = replay(drafter.eval(), states, heads, temperature)
    there = replay(drafter.cuda(), on_cuda(states), heads.cuda(), temperature)
    assert own.accepted.sum() > 0
    for name in ("document", "anchor", "accepted", "emitted", "available"):
        assert torch.equal(getattr(own, name), getattr(there, name)), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_over_nccl_train_as_one(mini_overrides, tmp_path):
    """The same documents in a step: two ranks of one micro-batch, one rank of two."""
    curves = []
    for ranks, batches in ((1, 2), (2, 1)):
        runs = tmp_path / str(ranks)
        options = [f"trainer.devices={ranks}", f"trainer.accumulate_grad_batches={batches}", "trainer.log_every_n_steps=1"]
        command = ["src.train", "experiment=stage1", *mini_overrides, "trainer=ddp8", "trainer.max_epochs=1", *options]
        environment = {**os.environ, "HYPERDFLASH_RUNS": str(runs), "WANDB_MODE": "offline"}
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (result,) = (runs / "train").glob("*/result.json")
        assert json.loads(result.read_text())["steps"] > 1
        rows = list(csv.DictReader((result.parent / "metrics.csv").open()))
        curves.append([float(row["train/loss"]) for row in rows if row["train/loss"]])
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)
