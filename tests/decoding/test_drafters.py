"""The loop's drafters against what training and replay compute, on a real target with random weights."""

from __future__ import annotations

import copy

import pytest
import torch

from hyperdflash.contracts import Document, TargetStates
from hyperdflash.decoding.loop import Generation, collect, decode, loop_rounds, speculate
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.conditioning import Layers, PreHcHead
from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.drafter import ADDITIONAL
from hyperdflash.drafting.heads.correction import Correction
from hyperdflash.drafting.heads.domino import Domino
from hyperdflash.drafting.heads.lm_head import LMHead
from hyperdflash.drafting.heads.markov import Markov
from hyperdflash.drafting.heads.selector import Selector
from hyperdflash.drafting.heads.xpress import XPress
from hyperdflash.drafting.inputs import Inputs
from hyperdflash.drafting.lead import MTPLead
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.drafting.mtp_proposer import MTPProposer
from hyperdflash.drafting.proposer import Autoregressive, BlockProposer
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.drafting.taps_and_tokens import TapsAndTokens
from hyperdflash.targets.generate import generate_batch
from hyperdflash.targets.load import Target, load_target
from hyperdflash.targets.producer import InProcess
from hyperdflash.targets.sampling import Sampler, generator_for
from hyperdflash.targets.session import TargetSession

EOS = 1
PROMPTS = [[0, 2, *range(40, 70)], [0, 2, 77, 90, 4, 5], [9]]
LIMIT = 30
SIZES = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, block_size=7, initializer_range=0.2)


@pytest.fixture(scope="module")
def target(mini_target) -> Target:
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


def block_drafter(target: Target, conditioning=None, reducer=None, head=None, layout="full", inputs=None, lead=None, **changes):
    """Weights that start at 0 get values, so that every part matters."""
    parts = DrafterParts(
        conditioning=conditioning or PreHcHead(),
        reducer=reducer or HcGate(),
        head=head or LMHead(),
        layout=layout,
        heads=target.heads,
        mask_token_id=7,
        inputs=inputs or Inputs(),
        lead=lead,
        load_mtp=lambda: copy.deepcopy(target.mtp),
    )
    drafter = DrafterConfig(**SIZES, **changes).build(parts, torch.Generator().manual_seed(0)).eval()
    draw = torch.Generator().manual_seed(1)
    for name, parameter in drafter.named_parameters():
        if name.split(".")[0] in ("head", *ADDITIONAL) or "_conv." in name:
            parameter.data.normal_(0.0, 0.3, generator=draw)
    return drafter


def captured(target: Target, prompts, generations: list[Generation], layer_ids=()) -> TargetStates:
    """States of the loop's own texts as in the cache: one padded forward pass, rounded to bf16."""
    texts = [[*prompt, *g.token_ids] for prompt, g in zip(prompts, generations, strict=True)]
    documents = [
        Document(str(i), "code", torch.tensor(text), torch.arange(len(text)) >= len(prompt))
        for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
    ]
    found = InProcess(target).states([d.input_ids for d in documents], layer_ids)

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensor.split([len(t) for t in texts]), batch_first=True).bfloat16()

    return TargetStates(
        ids=tuple(d.id for d in documents),
        domains=("code",) * len(texts),
        input_ids=torch.nn.utils.rnn.pad_sequence([d.input_ids for d in documents], batch_first=True),
        loss_mask=torch.nn.utils.rnn.pad_sequence([d.loss_mask for d in documents], batch_first=True),
        lengths=torch.tensor([len(text) for text in texts]),
        residual=rows(found[None]),
        layers=torch.stack([rows(found[i]) for i in layer_ids], dim=2) if layer_ids else None,
        layer_ids=tuple(layer_ids),
    )


def prefix(states: TargetStates, start: int, end: int) -> TargetStates:
    """Positions start..end-1 of the first row, as the loop passes them."""
    return TargetStates(
        ids=("",),
        domains=("",),
        input_ids=states.input_ids[:1, start:end],
        loss_mask=states.loss_mask[:1, start:end],
        lengths=torch.tensor([end - start]),
        residual=states.residual[:1, start:end],
        layers=None if states.layers is None else states.layers[:1, start:end],
        layer_ids=states.layer_ids,
    )


def text_states(layer_ids=(), length: int = 600) -> TargetStates:
    """Random states of one text in the cache's dtype."""
    draw = torch.Generator().manual_seed(3)
    return TargetStates(
        ids=("a",),
        domains=("code",),
        input_ids=torch.randint(3, 320, (1, length), generator=draw),
        loss_mask=torch.ones(1, length, dtype=torch.bool),
        lengths=torch.tensor([length]),
        residual=torch.randn(1, length, 4, 32, generator=draw).bfloat16(),
        layers=torch.randn(1, length, len(layer_ids), 4, 32, generator=draw).bfloat16() if layer_ids else None,
        layer_ids=tuple(layer_ids),
    )


class Recorder(Sampler):
    """Greedy; records the logits of its choices."""

    def choose(self, logits):
        self.__dict__.setdefault("logits", []).append(logits)
        return super().choose(logits)


CASES = {
    "pre_hc_head": (PreHcHead(), HcGate()),
    "layers": (Layers(layer_ids=[0, 3]), Fc()),
    "taps and tokens": (TapsAndTokens(layer_ids=[0, 3]), Fc()),
}


VARIANTS = {
    "dflash": dict(conditioning=CASES["layers"][0], reducer=Fc()),
    "markov": dict(head=Markov(rank=8)),
    "causal": dict(layout="causal"),
    "taps and tokens": dict(conditioning=CASES["taps and tokens"][0], reducer=Fc(), head=Markov(rank=8, confidence=True)),
    "gated": dict(head=Markov(rank=8, kind="gated")),
    "rnn": dict(head=Markov(rank=8, kind="rnn")),
    "correction": dict(head=Correction()),
    "domino": dict(head=Domino(state=8, rank=8)),
    "dflash2": dict(head=Selector(rank=8, top_k=5), convolution=2),
    "xpress": dict(head=XPress(rank=8, passes=3)),
    "anchor state": dict(inputs=Inputs(anchor_state=True)),
    "next token": dict(inputs=Inputs(next_token=True)),
    "lead": dict(lead=MTPLead(steps=1)),
    "long lead": dict(lead=MTPLead(steps=3, trainable=False), head=Markov(rank=8, kind="rnn"), layout="causal"),
    "whole lead": dict(lead=MTPLead(steps=6), head=Markov(rank=8)),
    "all parts": dict(lead=MTPLead(steps=2), head=Correction(), inputs=Inputs(anchor_state=True, next_token=True)),
}


@torch.inference_mode()
def walk_drafter(drafter, module, states: TargetStates, heads, start: int, steps: list[int], num_slots: int) -> None:
    """Proposes and updates along a text; every slot must have the logits of ``module`` from the same anchor."""
    drafter.begin(prefix(states, 0, start))
    anchor = start
    for step in steps:
        recorder = Recorder()
        draft = drafter.propose(states.input_ids[0, anchor : anchor + 1], num_slots, recorder)
        ids = states.input_ids.clone()  # a chained drafter reads its own drafts
        ids[0, anchor + 1 : anchor + 1 + num_slots] = draft.ids
        with_drafts = TargetStates(**{**vars(states), "input_ids": ids})
        at = torch.tensor([[anchor]])
        slots = module.slots(with_drafts, heads, at, torch.ones_like(at, dtype=torch.bool))
        expected = module.head.drafted(slots, heads)[0, 0, :num_slots].dense()
        got = torch.cat(recorder.logits)
        assert torch.allclose(got, expected, atol=1e-4), (anchor, float((got - expected).abs().max()))
        assert torch.equal(draft.ids, expected.argmax(-1))
        drafter.update(prefix(states, anchor, anchor + step))
        anchor += step


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("case", CASES)
def test_a_block_drafter_drafts_what_training_computes(case, window, target):
    drafter = block_drafter(target, *CASES[case], context_window=window)
    states = text_states(drafter.conditioning.layer_ids)
    loop = drafter.proposer(target.heads)
    assert isinstance(loop, BlockProposer) and loop.layer_ids == tuple(drafter.conditioning.layer_ids)
    # 120 + 400 states fill the first buffers; then another, shorter text
    walk_drafter(loop, drafter, states, target.heads, 120, [1, 7, 3, 200, 1, 189, 5], 6)
    walk_drafter(loop, drafter, states, target.heads, 1, [2, 1, 7], 4)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "dflash"])
def test_parts_draft_in_the_loop_what_training_computes(variant, target):
    drafter = block_drafter(target, **VARIANTS[variant])
    states = text_states(drafter.layer_ids)
    loop = drafter.proposer(target.heads)
    walk_drafter(loop, drafter, states, target.heads, 20, [1, 7, 3, 200, 1], 6)
    walk_drafter(loop, drafter, states, target.heads, 3, [2, 1], 2)


@pytest.mark.parametrize("start", [1, 5, 40])
def test_the_mtp_proposer_drafts_what_the_chain_drafts(start, target):
    chain = MTPChain(target.mtp, 6)  # window 16
    loop = chain.proposer(target.heads)
    assert isinstance(loop, MTPProposer) and loop.num_slots == 6
    walk_drafter(loop, chain, text_states(length=120), target.heads, start, [1, 7, 3, 2, 7, 7, 7, 1, 4], 6)
    walk_drafter(loop, chain, text_states(length=120), target.heads, start, [2, 1], 3)


@pytest.mark.parametrize("window", [None, 9])
def test_context_is_projected_once_and_appended_in_place(window, target):
    drafter = block_drafter(target, context_window=window)
    projected, project = [], drafter.project_context
    drafter.project_context = lambda context, positions: projected.extend(positions.tolist()) or project(context, positions)
    states = text_states()
    loop = BlockProposer(drafter, target.heads)
    buffers = []
    with torch.inference_mode():
        loop.begin(prefix(states, 0, 20))
        for anchor in range(20, 590, 3):
            loop.propose(states.input_ids[0, anchor : anchor + 1], 6, Sampler())
            loop.update(prefix(states, anchor, anchor + 3))
            if not any(loop._buffers[0][0] is buffer for buffer in buffers):
                buffers.append(loop._buffers[0][0])
    assert projected == list(range(590))
    # whole context: 256 rows, then 2 * 257 ..; a window's old rows are left behind, so it never needs more
    assert [buffer.shape[1] for buffer in buffers] == ([256, 514, 1030] if window is None else [256, 256, 256])


def test_drafts_at_a_temperature_come_from_the_given_probabilities(target):
    states = text_states()
    for loop in (BlockProposer(block_drafter(target), target.heads), MTPChain(target.mtp, 4).proposer(target.heads)):
        sampler = Sampler(0.8, 0.9, torch.Generator().manual_seed(0))
        with torch.inference_mode():
            loop.begin(prefix(states, 0, 30))
            draft = loop.propose(states.input_ids[0, 30:31], 4, sampler)
        assert draft.ids.shape == (4,) and draft.probs.shape == (4, 320)
        assert torch.allclose(draft.probs.sum(-1), torch.ones(4)) and (draft.probs.gather(1, draft.ids[:, None]) > 0).all()
        assert (draft.probs == 0).any()  # outside the nucleus


# The whole loop on the real target.


def learnt(module, target: Target, states: TargetStates, steps: int):
    """Trains a drafter on the text until some of its drafts are right and some are not."""
    anchors = torch.arange(3, states.input_ids.shape[1] - 1).expand(len(states.ids), -1)
    mask = (anchors < states.lengths[:, None] - 1) & states.loss_mask.gather(1, anchors)
    positions = anchors[..., None] + torch.arange(1, module.num_slots + 1)
    inside = mask[..., None] & (positions < states.lengths[:, None, None])
    labels = states.input_ids.gather(1, positions.clamp(max=states.input_ids.shape[1] - 1).flatten(1)).view(positions.shape)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        logits = module.head.logits(module.slots(states, target.heads, anchors, mask), target.heads).dense()
        loss = torch.nn.functional.cross_entropy(logits[inside], labels[inside])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.requires_grad_(False)


@pytest.fixture
def greedy(target) -> list[list[int]]:
    """The target's own texts, by batched plain decoding, which is independent of the loop."""
    done = dict(generate_batch(target.model, PROMPTS, eos_id=EOS, max_new_tokens=LIMIT))
    return [done[row] for row in range(len(PROMPTS))]


METHODS = ["autoregressive", "mtp", "hyperdflash", "markov mtp", *VARIANTS]


def trained_module(method: str, target: Target, greedy):
    plain = [Generation(tuple(ids), "length", None, ()) for ids in greedy]
    if method in ("mtp", "markov mtp"):
        head = Markov(rank=8).build(target.heads, 3) if method == "markov mtp" else None
        chain = MTPChain(copy.deepcopy(target.mtp), 3, head=head, trainable=True)
        return learnt(chain, target, captured(target, PROMPTS, plain), steps=12)
    drafter = block_drafter(target, **VARIANTS.get(method, {}))
    return learnt(drafter, target, captured(target, PROMPTS, plain, drafter.layer_ids), steps=12)


@pytest.mark.parametrize("method", METHODS)
def test_greedy_text_is_the_targets_and_the_rounds_are_replays(method, target, greedy):
    if method == "autoregressive":
        module, drafter = None, Autoregressive()
    else:
        module = trained_module(method, target, greedy)
        drafter = module.proposer(target.heads)
    generations = [decode(target.model, drafter, p, max_new_tokens=LIMIT, stop_ids={EOS}) for p in PROMPTS]
    for prompt, expected, generation in zip(PROMPTS, greedy, generations, strict=True):
        assert tuple(expected) == generation.token_ids, prompt
    if module is None:
        return
    rounds = loop_rounds(generations, drafter.num_slots)
    assert int(rounds.accepted.sum()) > 0 and (rounds.accepted < rounds.available).any()
    states = captured(target, PROMPTS, generations, drafter.layer_ids)
    replayed = replay(module, states, target.heads, 0.0)
    for name in ("document", "anchor", "accepted", "emitted", "available"):
        assert torch.equal(getattr(rounds, name), getattr(replayed, name)), name


RULED = {"mtp": 0.1, "markov mtp": 0.1, "hyperdflash": 0.002, "all parts": 0.1, "whole lead": 0.1, "taps and tokens": 0.1}


@pytest.mark.parametrize(("method", "stop"), RULED.items())
def test_a_rule_ends_drafts_early_and_leaves_the_text(method, stop, target, greedy):
    """Each round drafts the first slots of what it drafts without the rule; the MTP block runs no step behind its end."""
    module = trained_module(method, target, greedy)
    whole, early = module.proposer(target.heads), module.proposer(target.heads)
    early.stop = stop
    texts = [decode(target.model, early, prompt, max_new_tokens=LIMIT, stop_ids={EOS}) for prompt in PROMPTS]
    assert [text.token_ids for text in texts] == list(map(tuple, greedy))
    rounds = loop_rounds(texts, early.num_slots)
    assert bool((rounds.available >= rounds.accepted).all()) and len(set(rounds.available.tolist())) > 1

    states, lengths, num_steps = captured(target, PROMPTS[:1], texts[:1], early.layer_ids), set(), []
    lead = early if isinstance(early, MTPProposer) else early._lead
    if lead:
        lead._step = lambda *given, step=lead._step: num_steps.append(1) or step(*given)
    start = len(PROMPTS[0])
    with torch.inference_mode():
        for drafter in (whole, early):
            drafter.begin(prefix(states, 0, start))
        for anchor in range(start, start + 20):
            newest = states.input_ids[0, anchor : anchor + 1]
            all_ids, ids = (drafter.propose(newest, early.num_slots, Sampler()).ids.tolist() for drafter in (whole, early))
            assert ids == all_ids[: len(ids)]
            assert not lead or len(num_steps) == min(len(ids) + 1, len(all_ids), lead.num_slots)
            num_steps.clear()
            lengths.add(len(ids))
            for drafter in (whole, early):
                drafter.update(prefix(states, anchor, anchor + 1))
    assert len(lengths) > 1


def test_a_texts_draws_depend_on_its_generator_alone(target):
    drafter = MTPChain(target.mtp, 3).proposer(target.heads)

    def text(prompt: list[int], draws: str) -> tuple[int, ...]:
        sampler = Sampler(temperature=1.0, top_p=0.9, generator=generator_for(draws))
        return decode(target.model, drafter, prompt, max_new_tokens=12, stop_ids={EOS}, sampler=sampler).token_ids

    first = text(PROMPTS[1], "a")
    text(PROMPTS[0], "b")
    assert text(PROMPTS[1], "a") == first != text(PROMPTS[1], "b")


@pytest.mark.parametrize("kind", ["AR", "MTP", "DFlash", "all parts"])
def test_copies_in_lockstep_decode_the_one_text(target, kind):
    if kind == "AR":
        drafter = Autoregressive()
    elif kind == "MTP":
        drafter = MTPChain(target.mtp, 3).proposer(target.heads)
    elif kind == "DFlash":
        drafter = BlockProposer(block_drafter(target, Layers(layer_ids=(0, 2), paths="flat"), Fc()), target.heads)
    else:
        drafter = block_drafter(target, **VARIANTS["all parts"]).proposer(target.heads)

    def decode(copies: int) -> Generation:
        with TargetSession(target.model, drafter.layer_ids) as session:
            events = speculate(session, drafter, PROMPTS[0], max_new_tokens=20, stop_ids={EOS}, copies=copies)
            found = collect(events, {EOS})
            assert session.length == len(PROMPTS[0]) + len(found.token_ids) - 1
            return found

    one, three, again = decode(1), decode(3), decode(1)
    for other in (three, again):
        assert other.token_ids == one.token_ids
        assert [(r.anchor, r.drafted, r.accepted) for r in other.rounds] == [
            (r.anchor, r.drafted, r.accepted) for r in one.rounds
        ]
