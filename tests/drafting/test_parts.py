"""Inputs, lead and gated taps: each at its neutral setting, what each reads, and that each learns."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from hyperdflash.drafting.conditioning import PreHcHead, ResidualAndLayers
from hyperdflash.drafting.drafter import ADDITIONAL
from hyperdflash.drafting.inputs import Inputs
from hyperdflash.drafting.lead import MTPLead
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.drafting.reducers.hc_gates import HcGates
from hyperdflash.targets.load import load_mtp

ANCHORS = torch.tensor([[9, 10, 20], [9, 16, 29], [8, 20, 22]])
MASK = torch.ones(3, 3, dtype=torch.bool)
BOTH = Inputs(anchor_state=True, next_token=True)
GATED = dict(conditioning=ResidualAndLayers(layer_ids=[0, 5]), reducer=HcGates())


@pytest.fixture
def mtp(mini_target):
    block = load_mtp(mini_target, experts="dense")
    return lambda: copy.deepcopy(block)


def filled(drafter):
    draw = torch.Generator().manual_seed(3)
    for name, parameter in drafter.named_parameters():
        if name.split(".")[0] in ADDITIONAL or "_conv." in name:
            parameter.data.normal_(0.0, 0.3, generator=draw)
    return drafter


def features(drafter, states, heads):
    return drafter.slots(states, heads, ANCHORS, MASK).features


@pytest.mark.parametrize(
    "changes",
    [*(dict(inputs=one) for one in (Inputs(anchor_state=True), Inputs(next_token=True), BOTH)), dict(convolution=2)],
    ids=str,
)
def test_a_new_drafter_with_more_parts_is_the_one_without(changes, build, heads, states):
    plain, more = build(), build(**changes)
    assert torch.equal(features(plain, states, heads), features(more, states, heads))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, more.state_dict()[name]), name
    assert not torch.equal(features(plain, states, heads), features(filled(more), states, heads))


def test_new_gates_are_the_papers_gate_on_the_residual(build, heads, states):
    paper, gated = build(PreHcHead(), HcGate()), build(**GATED)
    assert torch.equal(features(paper, states, heads), features(gated, states, heads))
    gated.reducer.hc_scale.data[2] = 1.0
    moved = replace(states, layers=states.layers * torch.tensor([1.0, 1.0, 2.0])[:, None, None].bfloat16())
    assert not torch.equal(features(gated, states, heads), features(gated, moved, heads))


@pytest.mark.parametrize("changes", [dict(inputs=BOTH), GATED, dict(convolution=2)], ids=["inputs", "gates", "convolution"])
def test_every_weight_of_a_part_learns(changes, build, heads, states):
    drafter = filled(build(**changes))
    if "reducer" in changes:
        drafter.reducer.hc_scale.data.fill_(0.5)
    features(drafter, states, heads).square().mul(torch.arange(32)).sum().backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_the_anchor_state_is_the_newest_before_the_anchor(build, heads, states):
    """With the context hidden from attention, a block's slots move with H[a - 1] alone."""
    drafter = filled(build(inputs=Inputs(anchor_state=True)))
    for parameter in (layer.self_attn.v_proj.weight for layer in drafter.layers):
        parameter.data.zero_()
    before = features(drafter, states, heads)
    for position in (18, 19, 20):
        residual = states.residual.clone()
        residual[2, position] += 3.0
        changed = (features(drafter, replace(states, residual=residual), heads)[2] != before[2]).flatten(1).any(dim=1)
        assert changed.tolist() == [False, position == 19, False]


def test_a_context_state_is_paired_with_the_token_after_it(build, heads, states):
    """The pair of position a - 1 has the anchor's token; tokens after an anchor are unseen."""
    drafter = filled(build(inputs=Inputs(next_token=True)))
    context = drafter.context(states, heads)
    ids = states.input_ids.clone()
    ids[0, 20] = (ids[0, 20] + 1) % 64
    changed = (drafter.context(replace(states, input_ids=ids), heads) != context).any(dim=-1)
    assert changed.nonzero().tolist() == [[0, 19]]
    before, ids = features(drafter, states, heads), states.input_ids.clone()
    ids[0, 10:] = (ids[0, 10:] + 1) % 64
    after = features(drafter, replace(states, input_ids=ids), heads)
    assert torch.equal(after[0, 0], before[0, 0]) and not torch.equal(after[0, 1], before[0, 1])  # anchors 9 and 10


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_lead_slots_are_the_mtp_blocks_own(steps, build, heads, states, mtp):
    drafter = filled(build(lead=MTPLead(steps=steps), load_mtp=mtp))
    alone = MTPChain(mtp(), steps).slots(states, heads, ANCHORS, MASK).features
    assert torch.equal(features(drafter, states, heads)[:, :, :steps], alone)


def test_slots_see_the_tokens_of_lead_slots_before_them_alone(build, heads, states, mtp):
    drafter = filled(build(lead=MTPLead(steps=2), load_mtp=mtp))
    before = features(drafter, states, heads)[0, 0]  # anchor 9
    for offset, first in ((1, 2), (2, 3), (3, None), (4, None)):
        ids = states.input_ids.clone()
        ids[0, 9 + offset] = (ids[0, 9 + offset] + 1) % 64
        changed = (features(drafter, replace(states, input_ids=ids), heads)[0, 0] != before).any(dim=-1).tolist()
        assert changed == [first is not None and slot >= first for slot in range(1, 7)], offset


def test_a_lead_over_every_slot_is_the_chain(build, heads, states, mtp):
    drafter = build(lead=MTPLead(steps=6), load_mtp=mtp)
    assert isinstance(drafter, MTPChain) and drafter.num_slots == 6
    assert all(parameter.requires_grad for parameter in drafter.parameters())


@pytest.mark.parametrize("steps", [2, 6])
def test_a_batch_without_anchors_has_a_gradient_of_zero(steps, build, heads, states, mtp):
    """Other ranks wait for the gradients of every weight."""
    drafter = build(lead=MTPLead(steps=steps), load_mtp=mtp)
    slots = drafter.slots(states, heads, torch.zeros_like(ANCHORS), torch.zeros_like(MASK))
    drafter.head.logits(slots, heads).features[0].mul(0.0).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for n, p in drafter.named_parameters() if ".layer.mlp." not in n)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_lead_trains_with_the_rest_or_stays(trainable, build, heads, states, mtp):
    drafter = filled(build(lead=MTPLead(steps=2, trainable=trainable), load_mtp=mtp))
    features(drafter, states, heads).square().mul(torch.arange(32)).sum().backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.requires_grad == (trainable or not name.startswith("lead.")), name
        if parameter.requires_grad and ".layer.mlp." not in name:  # a token may reach no token of an expert
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda build: build(lead=MTPLead(steps=7)), r"lead\.steps must be in 1\.\.6"),
        (lambda build: build(lead=MTPLead(steps=6, trainable=False)), r"lead\.trainable=false leaves nothing to train"),
        (lambda build: MTPLead(steps=0), r"lead\.steps must be a positive integer"),
        (lambda build: Inputs(next_token=1), r"inputs\.next_token must be true or false"),
        (lambda build: build(PreHcHead(), HcGates()), r"reducer=hc_gates .* needs conditioning=residual_and_layers"),
    ],
)
def test_wrong_options_are_refused(make, message, build):
    with pytest.raises(ValueError, match=message):
        make(build)
