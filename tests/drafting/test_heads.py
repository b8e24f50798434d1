"""The Markov head at its neutral setting, teacher-forced, in the loop, and as a distribution."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from hyperdflash.contracts import BlockLayout, Slots
from hyperdflash.drafting.anchors import previous_ids
from hyperdflash.drafting.heads.head import DraftHead
from hyperdflash.drafting.heads.lm_head import LMDraftHead, LMHead
from hyperdflash.drafting.heads.markov import Markov, MarkovHead
from hyperdflash.drafting.heads.markov_confidence import MarkovConfidence
from hyperdflash.optim.muon import MuonWithAdamW
from hyperdflash.targets.sampling import Sampler

ANCHORS = torch.tensor([[9, 10, 20], [9, 16, 29], [8, 20, 22]])
MASK = torch.ones(3, 3, dtype=torch.bool)


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.7, generator=draw)
    return module


def slots_of(heads, num_slots: int = 6, seed: int = 1) -> Slots:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, num_slots, 32, generator=draw)
    previous = torch.randint(0, 64, (2, 3, num_slots), generator=draw)
    return Slots(features, previous, BlockLayout.chain(num_slots + 1))


def test_previous_tokens_are_those_before_each_slot(states):
    previous = previous_ids(states.input_ids, ANCHORS, BlockLayout.chain(7))
    assert previous.shape == (3, 3, 6)
    for row, index, slot in itertools.product(range(3), range(3), range(6)):
        at = min(int(ANCHORS[row, index]) + slot, 39)
        assert previous[row, index, slot] == states.input_ids[row, at]
    tree = BlockLayout(4, (0, 0, 1))  # two children of the anchor, and one of slot 1
    first = previous_ids(states.input_ids, ANCHORS, tree)[0, 0]
    assert torch.equal(first, states.input_ids[0, [9, 9, 10]])


@pytest.mark.parametrize("config", [Markov(rank=5), MarkovConfidence(rank=5)], ids=["markov", "markov_confidence"])
def test_a_new_markov_head_is_the_lm_head(config, build, heads, states):
    """W2 starts at 0: the same logits, the same drafts, and the same weights of everything else."""
    plain, drafter = build(), build(head=config)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, drafter.state_dict()[name]), name
    slots = drafter.slots(states, heads, ANCHORS, MASK)
    assert torch.equal(drafter.head.logits(slots, heads).dense(), plain.head.logits(slots, heads).dense())
    block, anchor_id = Slots(slots.features[:1, :1], slots.previous[:1, :1], slots.layout), states.input_ids[0, 9:10]
    drafts = [module.head.propose(block, heads, anchor_id, Sampler()) for module in (plain, drafter)]
    assert torch.equal(drafts[0].ids, drafts[1].ids)
    assert (drafts[1].confidence is None) == (not drafter.head.has_confidence)
    if drafter.head.has_confidence:
        assert torch.equal(drafts[1].confidence, torch.full((6,), 0.5))


def test_teacher_forced_logits_are_the_formula(heads):
    head, slots = filled(Markov(rank=5).build(heads)), slots_of(heads)
    bias = head.markov_w1.weight[slots.previous] @ head.markov_w2.weight.T
    expected = slots.features @ heads.lm_head.weight.T + bias
    logits = head.logits(slots, heads)
    torch.testing.assert_close(logits.dense(), expected)
    rows = logits.take(torch.arange(36))
    assert torch.equal(rows.argmax(), expected.view(36, -1).argmax(dim=-1))
    assert rows.is_argmax(expected.view(36, -1).argmax(dim=-1)).all()


def test_training_trains_both_tables(build, heads, states):
    drafter = build(head=Markov(rank=5))
    filled(drafter.head)
    logits = drafter.head.logits(drafter.slots(states, heads, ANCHORS, MASK), heads).take(torch.arange(54))
    logits.cross_entropy(torch.arange(54)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in drafter.parameters())
    assert heads.lm_head.weight.grad is None


@pytest.mark.parametrize("config", [LMHead(), Markov(rank=5), MarkovConfidence(rank=5)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_proposals_are_those_of_slot_by_slot_logits(config, temperature, heads):
    """The definition in DraftHead, which reads the LM head once per slot, gives the same drafts and probabilities."""
    head, slots = filled(config.build(heads)), slots_of(heads)
    slots = Slots(slots.features[:1, :1], slots.previous[:1, :1], slots.layout)
    anchor_id = torch.tensor([7])

    def proposed(propose):
        return propose(slots, heads, anchor_id, Sampler(temperature, 0.9, torch.Generator().manual_seed(3)))

    got, wanted = proposed(head.propose), proposed(lambda *rest: DraftHead.propose(head, *rest))
    assert torch.equal(got.ids, wanted.ids)
    for one, other in ((got.probs, wanted.probs), (got.confidence, wanted.confidence)):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_a_markov_proposal_follows_its_own_drafts(heads):
    head, slots = filled(Markov(rank=5).build(heads)), slots_of(heads)
    block = Slots(slots.features[:1, :1], slots.previous[:1, :1], slots.layout)
    ids = head.propose(block, heads, torch.tensor([7]), Sampler()).ids
    forced = replace(block, previous=torch.cat([torch.tensor([7]), ids[:-1]]).view(1, 1, -1))
    assert torch.equal(head.logits(forced, heads).dense()[0, 0].argmax(dim=-1), ids)
    plain = LMDraftHead().propose(block, heads, torch.tensor([7]), Sampler()).ids
    assert not torch.equal(plain, ids)


def test_tables_of_a_head_are_tables_for_the_optimizer(build):
    drafter = build(head=Markov(rank=5))
    tables = [module.weight for module in drafter.modules() if isinstance(module, torch.nn.Embedding)]
    optimizer = MuonWithAdamW(drafter.named_parameters(), tables=tables, lr=1e-3, weight_decay=0.1)
    kinds = {id(p): (group["muon"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert kinds[id(drafter.head.markov_w1.weight)] == kinds[id(drafter.head.markov_w2.weight)] == (False, 0.1)
    assert kinds[id(drafter.layers[0].mlp.up_proj.weight)] == (True, 0.1)


def test_a_wrong_rank_is_refused():
    with pytest.raises(ValueError, match=r"head\.rank must be a positive integer, got 0"):
        Markov(rank=0)
    assert isinstance(Markov(rank=3), Markov) and MarkovHead(8, 3).markov_w2.weight.shape == (8, 3)
