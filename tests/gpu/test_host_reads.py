"""A training step and replay's drafting on a device that refuses host reads: nothing in them waits for an accelerator.

Meta tensors refuse every read of a value. With the CUDA build of torch, fake tensors on ``cuda`` also refuse a tensor of
another device among them; no GPU is needed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import DeepseekV4Config

from hyperdflash.contracts import Blocks, TargetStates
from hyperdflash.drafting.conditioning import PreHcHead
from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.objectives.cross_entropy import PositionWeighted
from hyperdflash.objectives.distillation import Distillation
from hyperdflash.objectives.objective import Objective
from hyperdflash.objectives.sweep import first_largest, first_largest_on_host
from hyperdflash.targets.heads import TargetHeads

KL = Distillation(alpha=0.15, positions=2, temperature=1.0, teacher="mean_pool")
OBJECTIVE = Objective({"cross_entropy": PositionWeighted(gamma=4.0), "kl": KL})


def moved(module: nn.Module, device: str) -> nn.Module:
    """``module`` with parameters and buffers of ``device`` that hold no values."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty(value.shape, dtype=value.dtype, device=device), value.requires_grad
                )
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return module


Made = tuple[nn.Module, TargetHeads, TargetStates, Blocks]


def made(device: str, mode: AbstractContextManager) -> Made:
    """Drafter, heads, a batch of 2 documents of 40 tokens, and its 12 blocks each, on ``device``."""
    heads = TargetHeads(DeepseekV4Config(hidden_size=32, vocab_size=64, hc_mult=4, num_hidden_layers=3))
    sizes = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, block_size=7)
    parts = DrafterParts(conditioning=PreHcHead(), reducer=HcGate(), heads=heads, mask_token_id=2)
    drafter = DrafterConfig(**sizes).build(parts, torch.Generator().manual_seed(0))

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with mode:
        states = TargetStates(
            ids=("a", "b"),
            domains=("math", "code"),
            input_ids=empty(2, 40, dtype=torch.int64),
            loss_mask=empty(2, 40, dtype=torch.bool),
            lengths=empty(2, dtype=torch.int64),
            residual=empty(2, 40, 4, 32, dtype=torch.bfloat16),
        )
        blocks = Blocks(
            anchors=empty(2, 12, dtype=torch.int64),
            anchor_mask=empty(2, 12, dtype=torch.bool),
            labels=empty(2, 12, 6, dtype=torch.int64),
            label_mask=empty(2, 12, 6, dtype=torch.bool),
        )
        return moved(drafter, device), moved(heads.requires_grad_(False), device), states, blocks


def loss_of(parts: Made) -> torch.Tensor:
    drafter, heads, states, blocks = parts
    logits = drafter.head.logits(drafter.slots(states, heads, blocks.anchors, blocks.anchor_mask), heads)
    return OBJECTIVE.loss(OBJECTIVE.sums(logits, blocks, states.residual, heads))


@torch.no_grad()
def draft(parts: Made) -> torch.Tensor:
    """What replay asks of a drafter and its head, between its own selections of rows."""
    drafter, heads, states, blocks = parts
    logits = drafter.eval().head.logits(drafter.slots(states, heads, blocks.anchors, blocks.anchor_mask), heads)
    return logits.take(torch.arange(24, device=states.input_ids.device)).is_argmax(blocks.labels.flatten()[:24])


@pytest.fixture
def meta(monkeypatch) -> Made:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # autocast knows no meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    return made("meta", nullcontext())


def test_a_training_step_reads_nothing_on_the_host(meta):
    loss_of(meta).backward()
    drafter = meta[0]
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in drafter.parameters() if p.requires_grad)
    assert nn.utils.clip_grad_norm_(drafter.parameters(), 1.0).device.type == "meta"


def test_replays_drafting_reads_nothing_on_the_host(meta):
    assert draft(meta).shape == (24,)


def test_a_host_read_is_seen(meta):
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(draft(meta).any())


needs_the_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="needs the CUDA build of torch")


@needs_the_cuda_build
def test_a_training_step_on_cuda_mixes_no_devices_and_reads_nothing_on_the_host():
    """Without FlexAttention, which compiles, and without the backward pass, which autograd does not run on fake tensors."""
    mode = FakeTensorMode()
    parts = made("cuda", mode)
    with mode, torch.no_grad():
        assert loss_of(parts).device.type == "cuda"


@needs_the_cuda_build
def test_replays_drafting_on_cuda_mixes_no_devices_and_reads_nothing_on_the_host():
    mode = FakeTensorMode()
    parts = made("cuda", mode)
    with mode:
        assert draft(parts).device.type == "cuda"


@needs_the_cuda_build
def test_a_tensor_of_another_device_and_a_host_read_are_seen():
    mode = FakeTensorMode()
    drafter, heads, states, blocks = made("cuda", mode)
    with mode, torch.no_grad():
        on_the_host = replace(states, input_ids=torch.empty(2, 40, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="device"):
            loss_of((drafter, heads, on_the_host, blocks))
        with pytest.raises(DataDependentOutputException):
            bool(draft((drafter, heads, states, blocks)).any())


def test_both_ways_to_find_the_first_largest_logit_agree():
    """The way without host reads, on meta tensors by shape and here by value, beside the CPU's."""
    logits = torch.randint(0, 4, (64, 9), generator=torch.Generator().manual_seed(0)).float()
    column = torch.arange(64) % 13 - 2
    expected = (logits.argmax(dim=1) == column) & (column >= 0) & (column < 9)
    assert 0 < expected.sum() < 64
    assert torch.equal(first_largest_on_host(logits, logits.amax(dim=1), column), expected)
    assert torch.equal(first_largest(logits, logits.amax(dim=1), column), expected)
