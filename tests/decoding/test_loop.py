"""The draft-verify loop against hand-computed rounds, the sequential reference, the walk of replay and exact probabilities."""

from __future__ import annotations

import pytest
import torch

from hyperdflash.contracts import Rounds
from hyperdflash.decoding import acceptance
from hyperdflash.decoding.loop import FirstToken, collect, loop_rounds, speculate
from hyperdflash.decoding.replay import walk
from hyperdflash.drafting.proposer import Autoregressive
from hyperdflash.targets.sampling import Sampler
from tests.decoding.scripted import (
    VOCAB,
    MarkovDrafter,
    MarkovSession,
    ScriptedDrafter,
    TextSession,
    batched_loop,
    joint_p_value,
    markov_joint,
)

STOP = 49


def run(text, right, prompt_length=3, max_new_tokens=100, stop_ids=(STOP,)):
    """(generation, session, drafter) of one greedy text."""
    session = TextSession(text)
    drafter = ScriptedDrafter(text, right) if right else Autoregressive()
    events = speculate(session, drafter, text[:prompt_length], max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    return collect(events, stop_ids), session, drafter


def shown(generation) -> list[tuple[int, int, int]]:
    return [(r.anchor, r.accepted, len(r.emitted)) for r in generation.rounds]


def same(left: Rounds, right: Rounds) -> bool:
    names = ("document", "anchor", "accepted", "emitted", "available")
    return left.num_slots == right.num_slots and all(torch.equal(getattr(left, n), getattr(right, n)) for n in names)


COUNT = list(range(10, 40))  # 30 tokens, none of them STOP


def test_always_right_emits_seven_per_round_and_clips_the_last():
    generation, session, _ = run(COUNT, [[True] * 6] * 30, max_new_tokens=12)
    # the prefill's token at 3; 11 more at 4..14: 7, then 4 drafts reach the last place and the bonus has none
    assert shown(generation) == [(3, 6, 7), (10, 4, 4)]
    assert generation.token_ids == tuple(COUNT[3:15]) and generation.ended_by == "length"
    assert session.calls == [("extend", 7), ("rollback", 7), ("extend", 5), ("rollback", 4)]
    assert generation.tau == 5.5


def test_never_right_is_one_token_a_round():
    generation, session, _ = run(COUNT, [[False] * 6] * 30, max_new_tokens=4)
    assert shown(generation) == [(3, 0, 1), (4, 0, 1), (5, 0, 1)]
    assert [keep for name, keep in session.calls if name == "rollback"] == [1, 1, 1]
    assert generation.token_ids == tuple(COUNT[3:7])


def test_plain_autoregression_is_the_loop_without_drafts():
    generation, session, drafter = run(COUNT, None, max_new_tokens=4)
    assert generation.token_ids == tuple(COUNT[3:7]) and generation.tau == 1.0
    assert session.calls == [("extend", 1), ("rollback", 1)] * 3
    assert loop_rounds([generation], drafter.num_slots).available.tolist() == [0, 0, 0]


def test_a_stop_token_inside_an_accepted_run_ends_the_text_there():
    text = [*COUNT[:7], STOP, *COUNT[8:]]
    generation, session, drafter = run(text, [[True] * 6] * 30)
    # anchor 3, drafts 4..9 all right, the stop token stands at 7: four accepted, nothing after it
    assert shown(generation) == [(3, 4, 4)] and generation.rounds[0].drafted == tuple(text[4:10])
    assert generation.token_ids == (*COUNT[3:7], STOP) and generation.ended_by == "stop"
    assert session.length == 7 and drafter.seen == text[:7]  # the last token's state is never needed


def test_a_stop_token_as_the_targets_own_ends_the_text():
    text = [*COUNT[:7], STOP, *COUNT[8:]]
    generation, *_ = run(text, [[True, True, True, False, True, True]] * 30)
    assert shown(generation) == [(3, 3, 4)] and generation.token_ids[-1] == STOP


@pytest.mark.parametrize(("limit", "stops"), [(1, ()), (5, (COUNT[3],))])
def test_a_text_of_one_token_has_no_round(limit, stops):
    generation, session, drafter = run(COUNT, [[True] * 6] * 30, max_new_tokens=limit, stop_ids=stops)
    assert generation.token_ids == (COUNT[3],) and generation.rounds == () and session.calls == []
    assert generation.ended_by == ("stop" if stops else "length")
    assert drafter.seen == [] and loop_rounds([generation], 6).anchor.tolist() == []


def test_a_prompt_of_one_token():
    generation, *_ = run(COUNT, [[True, False, True]] * 30, prompt_length=1, max_new_tokens=6)
    assert shown(generation) == [(1, 1, 2), (3, 1, 2), (5, 1, 1)] and generation.token_ids == tuple(COUNT[1:7])


def test_the_drafter_gets_every_accepted_state_once_and_rounded_and_none_of_a_rejected_token():
    draw = torch.Generator().manual_seed(0)
    right = (torch.rand(30, 6, generator=draw) < 0.7).tolist()
    generation, session, drafter = run(COUNT, right, max_new_tokens=20)
    given = torch.cat(drafter.residuals)
    assert given.dtype == torch.bfloat16
    assert given.tolist() == list(range(22))  # state i is the number i: H[0..21] before the last token x[22]
    assert drafter.seen == COUNT[:22] == session.token_ids
    assert drafter.anchors == [r.anchor for r in generation.rounds]


@pytest.mark.parametrize("num_slots", [1, 3, 6])
def test_randomly_right_is_the_sequential_reference_and_the_walk_of_replay(num_slots, sequential_loop):
    draw = torch.Generator().manual_seed(num_slots)
    generations, walks, ends = [], [], []
    for document in range(12):
        text = torch.randint(0, VOCAB, (60,), generator=draw).tolist()
        right = torch.rand(60, num_slots, generator=draw) < (0.3 + 0.05 * document)
        start, limit = 1 + document, 5 + 3 * document
        generation, *_ = run(text, right.tolist(), prompt_length=start, max_new_tokens=limit)
        end = start + len(generation.token_ids) - 1
        assert generation.token_ids == tuple(text[start : end + 1])
        stopped = STOP in text[start : start + limit]
        assert end == (text.index(STOP, start) if stopped else start + limit - 1)

        def wrong_or_right(anchor: int, text=text, right=right) -> list[int]:
            truth = [*text, *[0] * num_slots][anchor + 1 : anchor + 1 + num_slots]
            return [t if ok else -1 for t, ok in zip(truth, right[anchor].tolist(), strict=True)]

        assert shown(generation) == sequential_loop(wrong_or_right, text, num_slots, start, end)
        generations.append(generation)
        walks.append(right)
        ends.append((start, end))
    starts, stops = torch.tensor(ends).unbind(1)
    assert same(loop_rounds(generations, num_slots), walk(torch.stack(walks), starts, stops))


def test_rounds_come_one_at_a_time():
    session = TextSession(COUNT)
    drafter = ScriptedDrafter(COUNT, [[True] * 3] * 30)
    events = speculate(session, drafter, COUNT[:2], max_new_tokens=20, stop_ids=())
    first = next(events)
    assert isinstance(first, FirstToken) and first.token_id == COUNT[2] and session.calls == []
    assert next(events).emitted == tuple(COUNT[3:7]) and len(session.calls) == 2
    events.close()


def test_seconds_cover_the_three_parts():
    generation, *_ = run(COUNT, [[True] * 6] * 30, max_new_tokens=20)
    seconds = generation.seconds
    assert min(seconds.draft, seconds.verify, seconds.rest, generation.first.seconds.total) > 0
    assert seconds.total == pytest.approx(sum(r.seconds.total for r in generation.rounds))
    emitted = sum(len(r.emitted) for r in generation.rounds)
    assert generation.tokens_per_second == pytest.approx(emitted / seconds.total)


@pytest.mark.parametrize(
    ("prompt", "limit", "sentence"), [([], 5, "a prompt has no tokens"), ([1], 0, "max_new_tokens must be a positive integer")]
)
def test_wrong_arguments_are_refused(prompt, limit, sentence):
    with pytest.raises(ValueError, match=sentence):
        next(speculate(TextSession(COUNT), Autoregressive(), prompt, max_new_tokens=limit, stop_ids=()))


# Sampling: the joint distribution of the first three tokens, against exact enumeration.

SETTINGS = [(1.0, 1.0), (1.3, 0.85)]


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a Markov target [V, V] and of a drafter's two slots [2, V, V], four tokens, far from each other."""
    draw = torch.Generator().manual_seed(5)
    return torch.randn(4, 4, generator=draw), 1.5 * torch.randn(2, 4, 4, generator=draw)


def p_value_of_the_rule(temperature: float, top_p: float, num: int = 200_000) -> float:
    target, drafter = tables()
    generator = torch.Generator().manual_seed(1)
    tokens = batched_loop(target, drafter, 0, num, acceptance.verify_sampled, temperature, top_p, generator)
    return joint_p_value(tokens, markov_joint(target, 0, temperature, top_p))


def p_value_of_the_loop(temperature: float, top_p: float, num: int = 1500) -> float:
    target, drafter = tables()
    sampler = Sampler(temperature, top_p, torch.Generator().manual_seed(2))
    texts = []
    for _ in range(num):
        events = speculate(MarkovSession(target), MarkovDrafter(drafter), [0], max_new_tokens=3, stop_ids=(), sampler=sampler)
        texts.append(collect(events, ()).token_ids)
    return joint_p_value(torch.tensor(texts), markov_joint(target, 0, temperature, top_p))


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_sampled_text_is_the_targets(temperature, top_p):
    assert p_value_of_the_rule(temperature, top_p) > 0.01
    assert p_value_of_the_loop(temperature, top_p) > 0.01


BROKEN = {
    "always accepted": ("keep_draft", lambda p, q, u: torch.ones_like(u, dtype=torch.bool)),
    "the ratio upside down": ("keep_draft", lambda p, q, u: u * p < q),
    "p in place of the residual": ("residual", lambda p, q: p),
    "the residual of the wrong sign": ("residual", lambda p, q: (q - p).clamp(min=0) + 1e-9),
}
# accepts 2% of what must be rejected; 2% of the residual's mass is spread evenly
SLIGHTLY_BROKEN = {
    "2% too many accepted": ("keep_draft", lambda p, q, u: u * q < p + 0.02 * (q - p).clamp(min=0)),
    "2% of the residual elsewhere": (
        "residual",
        lambda p, q: (p - q).clamp(min=0) + 0.02 * (p - q).clamp(min=0).sum(-1, keepdim=True) / p.shape[-1],
    ),
}


@pytest.mark.parametrize("name", [*BROKEN, *SLIGHTLY_BROKEN])
def test_a_broken_rule_is_detected(name, monkeypatch):
    function, broken = {**BROKEN, **SLIGHTLY_BROKEN}[name]
    monkeypatch.setattr(acceptance, function, broken)
    assert p_value_of_the_rule(1.0, 1.0) < 1e-4
    if name in BROKEN:
        assert p_value_of_the_loop(1.0, 1.0, num=500) < 1e-4


def test_a_certain_draft_has_the_distribution_of_one_token():
    """A drafter without probabilities is certain: at T > 0 its token is accepted with the target's probability of it."""
    target, _ = tables()
    p = torch.softmax(target, -1)
    drafted = torch.full((200_000, 1), 2)
    q = torch.nn.functional.one_hot(drafted, 4).float()
    accepted, following = acceptance.verify_sampled(drafted, q, p[:2].expand(200_000, -1, -1), torch.Generator().manual_seed(0))
    assert abs(float(accepted.float().mean()) - float(p[0, 2])) < 0.005
    assert not (following[accepted == 0] == 2).any()
