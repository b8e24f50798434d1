"""Draft heads at their neutral setting, teacher-forced and in the loop."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from hyperdflash.contracts import BlockLayout, Slots
from hyperdflash.drafting.anchors import previous_ids
from hyperdflash.drafting.heads.correction import Correction
from hyperdflash.drafting.heads.domino import Domino
from hyperdflash.drafting.heads.lm_head import LMHead
from hyperdflash.drafting.heads.markov import Markov
from hyperdflash.drafting.heads.selector import Selector
from hyperdflash.drafting.heads.xpress import XPress
from hyperdflash.drafting.lead import MTPLead
from hyperdflash.objectives import factored_logits
from hyperdflash.optim.muon import MuonWithAdamW
from hyperdflash.targets.sampling import Sampler
from tests.proposed_block import propose

SEQUENTIAL = {
    "vanilla": Markov(rank=5),
    "confidence": Markov(rank=5, confidence=True),
    "gated": Markov(rank=5, kind="gated"),
    "rnn": Markov(rank=5, kind="rnn"),
    "correction": Correction(),
    "domino": Domino(state=6, rank=5),
    "selector": Selector(rank=5, top_k=7),
    "xpress": XPress(rank=5, passes=2),
}
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


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_new_head_is_the_lm_head(name, build, heads, states):
    """Its last projection starts at 0: the same logits, the same drafts, and the same weights of everything else."""
    plain, drafter = build(), build(head=SEQUENTIAL[name])
    for name, value in plain.state_dict().items():
        assert torch.equal(value, drafter.state_dict()[name]), name
    slots = drafter.slots(states, heads, ANCHORS, MASK)
    new, old = (module.head.logits(slots, heads).dense() for module in (drafter, plain))
    drafted = new > float("-inf")  # of a selector, the best tokens
    assert torch.equal(new[drafted], old[drafted]) and torch.equal(new.argmax(dim=-1), old.argmax(dim=-1))
    block, anchor_id = Slots(slots.features[:1, :1], slots.previous[:1, :1], slots.layout), states.input_ids[0, 9:10]
    drafts = [propose(module.head, block, heads, anchor_id, Sampler()) for module in (plain, drafter)]
    assert torch.equal(drafts[0].ids, drafts[1].ids)
    assert (drafts[1].confidence is None) == (not drafter.head.has_confidence)
    if drafter.head.has_confidence:
        assert torch.equal(drafts[1].confidence, torch.full((6,), 0.5))


def expected_logits(name, head, slots, heads) -> torch.Tensor:
    """The formulas of the heads' modules, slot by slot, with whole tables: [B, A, S, V]."""
    w, memory, found = heads.lm_head.weight, torch.zeros(2, 3, 5), []
    if name == "xpress":
        h, tokens = slots.features, head.token_embed.weight[slots.previous]
        mean = torch.stack([h.mean(dim=2) @ head.down_g.weight.T] * 6, dim=2)
        a = torch.cat([h @ head.down_h.weight.T, mean, tokens], -1) @ head.in_proj.weight.T
        mixed = [sum(head.mixing[:, k, j] * a[:, :, j] for j in range(k + 1)) for k in range(6)]
        a = a + torch.stack(mixed, dim=2)
        gate, up, down = (getattr(head.mlp, f"{part}_proj").weight.T for part in ("gate", "up", "down"))
        return h @ w.T + (a + (torch.nn.functional.silu(a @ gate) * (a @ up)) @ down) @ head.readout.weight.T
    for slot in range(slots.features.shape[2]):
        h, token = slots.features[:, :, slot], slots.previous[:, :, slot]
        if name == "correction":
            inner = h @ head.state_proj.weight.T + heads.embed_tokens.weight[token] @ head.token_proj.weight.T
            found.append((h + torch.nn.functional.silu(inner) @ head.down_proj.weight.T) @ w.T)
            continue
        if name == "domino":
            gru = torch.nn.GRU(32, 6, bias=False, batch_first=True)
            gru.load_state_dict({f"{key}_l0": value for key, value in head.gru.state_dict().items()})
            state = gru(heads.embed_tokens.weight[slots.previous[:, :, : slot + 1]].flatten(0, 1))[1].view(2, 3, 6)
            bias = torch.nn.functional.silu(torch.cat([h, state], -1) @ head.joint_proj.weight.T)
            found.append(h @ w.T + bias @ head.token_table.weight.T)
            continue
        if name == "selector":
            context = head.predecessor_codebook.weight[token] * (h @ head.hidden_projection.weight.T)
            unary = h @ w.T
            worse = unary < unary.sort(dim=-1, descending=True).values[..., 6:7]
            found.append((unary + context @ head.successor_codebook.weight.T).masked_fill(worse, float("-inf")))
            continue
        e = bias = head.markov_w1.weight[token]
        if name == "gated":
            bias = torch.sigmoid(torch.cat([h, e], -1) @ head.gate_proj.weight.T + head.gate_proj.bias) * e
        if name == "rnn":
            z = torch.cat([memory, e, h], -1) @ head.joint_proj.weight.T + head.joint_proj.bias
            gate, candidate, output = z[..., :5].sigmoid(), z[..., 5:10].tanh(), z[..., 10:].tanh()
            memory, bias = gate * memory + (1 - gate) * candidate, output
        found.append(h @ w.T + bias @ head.markov_w2.weight.T)
    return torch.stack(found, dim=2)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_teacher_forced_logits_are_the_formula(name, heads):
    head, slots = filled(SEQUENTIAL[name].build(heads, 6)), slots_of(heads)
    expected = expected_logits(name, head, slots, heads)
    logits = head.logits(slots, heads)
    torch.testing.assert_close(logits.dense(), expected, rtol=1e-4, atol=1e-4)
    rows = logits.take(torch.arange(36))
    assert torch.equal(rows.argmax(), expected.view(36, -1).argmax(dim=-1))
    assert rows.is_argmax(expected.view(36, -1).argmax(dim=-1)).all()
    if head.has_confidence:
        joined = torch.cat([slots.features, head.markov_w1.weight[slots.previous]], dim=-1)
        estimate = joined @ head.confidence_proj.weight[0] + head.confidence_proj.bias
        torch.testing.assert_close(logits.confidence, estimate)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_training_trains_every_weight_of_a_head(name, build, heads, states):
    drafter = build(head=SEQUENTIAL[name])
    filled(drafter.head)
    logits = drafter.head.logits(drafter.slots(states, heads, ANCHORS, MASK), heads).take(torch.arange(54))
    loss = logits.values(torch.arange(54)).cross_entropy.sum()
    (loss if logits.confidence is None else loss + logits.confidence.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in drafter.parameters())
    assert heads.lm_head.weight.grad is None


@pytest.mark.parametrize("name", ["lm_head", *SEQUENTIAL])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_proposal_has_the_teacher_forced_logits_of_its_own_drafts(name, temperature, heads):
    """Slot by slot after its own drafts, the head gives the probabilities that training computes for that text."""
    head, slots = filled((SEQUENTIAL | {"lm_head": LMHead()})[name].build(heads, 6)), slots_of(heads)
    block = Slots(slots.features[:1, :1], slots.previous[:1, :1], slots.layout)
    sampler = Sampler(temperature, 0.9, torch.Generator().manual_seed(3))
    proposal = propose(head, block, heads, torch.tensor([7]), sampler)
    forced = replace(block, previous=torch.cat([torch.tensor([7]), proposal.ids[:-1]]).view(1, 1, -1))
    logits = head.drafted(forced, heads)
    if temperature == 0:
        assert torch.equal(logits.dense()[0, 0].argmax(dim=-1), proposal.ids) and proposal.probs is None
    else:
        torch.testing.assert_close(proposal.probs, sampler.probabilities(logits.dense()[0, 0]))
    if head.has_confidence:
        torch.testing.assert_close(proposal.confidence, logits.confidence[0, 0].sigmoid())


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_proposal_follows_its_own_drafts(name, heads):
    head, slots = filled(SEQUENTIAL[name].build(heads, 6)), slots_of(heads)
    block = Slots(slots.features[:1, :1], slots.previous[:1, :1], slots.layout)
    drafts = {tuple(propose(head, block, heads, torch.tensor([anchor]), Sampler()).ids.tolist()) for anchor in range(64)}
    assert len(drafts) > 1


@pytest.mark.parametrize("name", ["lm_head", *SEQUENTIAL])
def test_a_block_reads_the_lm_head_once(name, heads, monkeypatch):
    """Each head but the correction, which changes what the LM head reads."""
    head, slots = filled((SEQUENTIAL | {"lm_head": LMHead()})[name].build(heads, 6)), slots_of(heads)
    block, reads, real = Slots(slots.features[:1, :1], slots.previous[:1, :1], slots.layout), [], factored_logits.product
    monkeypatch.setattr(
        factored_logits, "product", lambda x, table: reads.append(table is heads.lm_head.weight) or real(x, table)
    )
    with torch.no_grad():
        propose(head, block, heads, torch.tensor([7]), Sampler())
    assert sum(reads) == (6 if name == "correction" else 1)


def test_as_many_passes_as_slots_are_the_greedy_walk(heads, monkeypatch):
    slots, found = slots_of(heads), {}
    for passes in (1, 3, 6):
        head = filled(XPress(rank=5, passes=passes, trained_passes=3).build(heads, 6))
        found[passes] = head.drafted(slots, heads).dense()
    walked = slots.previous.clone()
    for slot in range(1, 6):
        drafts = head.logits(replace(slots, previous=walked), heads).dense().argmax(dim=-1)
        walked[..., slot] = drafts[..., slot - 1]
    assert torch.equal(found[6], head.logits(replace(slots, previous=walked), heads).dense())
    assert not torch.equal(found[1].argmax(dim=-1), found[6].argmax(dim=-1))
    free = head.logits(slots, heads).free  # what training reads
    assert len(free) == 3 and torch.equal(free[0].dense(), found[1]) and torch.equal(free[2].dense(), found[3])
    with torch.no_grad():
        assert head.logits(slots, heads).free == ()
    whole, shapes, real = head.drafted(slots, heads).dense(), [], factored_logits.product
    watched = lambda x, table: shapes.append(x.shape) or real(x, table)  # noqa: E731
    monkeypatch.setattr(factored_logits, "product", watched)
    monkeypatch.setattr("hyperdflash.drafting.heads.xpress.LOGITS_BYTES", 2 * 6 * 64 * 4)  # two blocks' whole logits
    by_parts = head.drafted(slots, heads)
    assert {shape[:2] for shape in shapes} == {(2, 6)} and torch.equal(by_parts.dense(), whole)


def test_a_head_that_reads_the_block_refuses_a_chain(build):
    with pytest.raises(ValueError, match="reads whole blocks, and the MTP block drafts slot by slot"):
        build(head=XPress(rank=5), lead=MTPLead(steps=1))


def test_tables_of_a_head_are_tables_for_the_optimizer(build):
    drafter = build(head=Markov(rank=5))
    tables = [module.weight for module in drafter.modules() if isinstance(module, torch.nn.Embedding)]
    optimizer = MuonWithAdamW(drafter.named_parameters(), tables=tables, lr=1e-3, weight_decay=0.1)
    kinds = {id(p): (group["muon"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert kinds[id(drafter.head.markov_w1.weight)] == kinds[id(drafter.head.markov_w2.weight)] == (False, 0.1)
    assert kinds[id(drafter.layers[0].mlp.up_proj.weight)] == (True, 0.1)


def test_a_selector_s_candidates_are_a_few_of_the_vocabulary(heads):
    with pytest.raises(ValueError, match=r"head\.top_k must be in 1\.\.64 \(the vocabulary\), got 65"):
        Selector(top_k=65).build(heads, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Markov(rank=0), r"head\.rank must be a positive integer, got 0"),
        (lambda: Markov(kind="lstm"), r"head\.kind must be vanilla or gated or rnn"),
        (lambda: Correction(expansion=0), r"head\.expansion must be a positive integer"),
        (lambda: XPress(passes=0), r"head\.passes must be a positive integer"),
        (lambda: Selector(top_k=0), r"head\.top_k must be a positive integer"),
        (lambda: Domino(state=0), r"head\.state must be a positive integer"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
