"""Differences are found at their position, and are ties only within the gap."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hyperdflash.contracts import BlockLayout, Rounds, Slots, TargetStates
from hyperdflash.decoding.agreement import compare_greedy, compare_rounds
from hyperdflash.decoding.loop import FirstToken, Generation, Round, Seconds
from hyperdflash.drafting.heads.lm_head import LMDraftHead


class Model:
    """The same logits after every text; ``dtype`` decides the default tolerance."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, logits):
        self.logits_row, self.texts = torch.tensor(logits), []

    def __call__(self, input_ids, **_):
        self.texts.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.logits_row[None, None])


def test_equal_texts_need_no_forward_pass():
    assert compare_greedy(None, [1], [4, 5], (4, 5)) is None


def test_a_difference_is_a_tie_only_within_the_gap():
    model = Model([0.0, 2.0, 1.9996, 1.0])
    found = compare_greedy(model, [7, 8], [3, 1, 0], [3, 2, 9])
    assert (found.position, found.expected_id, found.got_id, found.tie) == (1, 1, 2, True)
    assert found.gap == pytest.approx(0.0004, abs=1e-5) and model.texts == [[7, 8, 3]]
    assert not compare_greedy(model, [7], [3, 1], [3, 2], tolerance=1e-4).tie
    # both far below the best token: no tie, however near to each other
    assert not compare_greedy(Model([0.5, 2.0, 3.0, 0.5]), [7], [0], [3]).tie


def test_a_shorter_text_is_no_tie():
    found = compare_greedy(Model([0.0] * 4), [7], [3, 1, 2], [3, 1])
    assert (found.position, found.expected_id, found.got_id, found.tie) == (2, 2, None, False)


# A text 0..11, answers from position 2; the drafter always drafts x + 1 with logit 1, and ``second`` at logit ``near``.
TEXT = list(range(12))


class Drafter:
    num_slots, head = 3, LMDraftHead()

    def __init__(self, second: int, near: float):
        self.second, self.near = second, near

    def slots(self, states, heads, anchors, anchor_mask):
        hidden = torch.zeros(*anchors.shape, 3, 16)
        for slot in range(3):
            hidden[0, 0, slot, int(anchors) + slot + 1] = 1.0
        hidden[0, 0, 1, self.second] = self.near
        return Slots(hidden, torch.zeros(*anchors.shape, 3, dtype=torch.int64), BlockLayout.chain(4))


def generation(rounds) -> Generation:
    return Generation(tuple(TEXT[2:]), "length", FirstToken(2, Seconds()), tuple(rounds))


def states() -> TargetStates:
    return TargetStates(
        ids=("a",),
        domains=("math",),
        input_ids=torch.tensor([TEXT]),
        loss_mask=torch.arange(12)[None] >= 2,
        lengths=torch.tensor([12]),
        final=torch.zeros(1, 12, 1, 4),
    )


def rounds_of(anchors, accepted) -> Rounds:
    count = torch.tensor(accepted)
    return Rounds(torch.zeros_like(count), torch.tensor(anchors), count, count + 1, torch.full_like(count, 3), num_slots=3)


HEADS = SimpleNamespace(lm_head=SimpleNamespace(weight=torch.eye(16)), dtype=torch.float32)


@pytest.mark.parametrize(("near", "tie"), [(0.995, True), (0.98, False)])
def test_a_round_that_differs_is_found_with_its_gap(near, tie):
    # from anchor 5 the loop drafted 13 for x[7]; replay accepts all three there
    written = [(2, (3, 9, 9), 1, (3, 4)), (4, (9, 9, 9), 0, (5,)), (5, (6, 13, 8), 1, (6, 7))]
    loop = generation([Round(*row, Seconds()) for row in written])
    replayed = rounds_of([2, 4, 5, 9], [1, 0, 3, 2])
    (found,) = compare_rounds([loop], replayed, Drafter(13, near), states(), HEADS)
    assert (found.document, found.anchor, found.loop_accepted, found.replay_accepted) == (0, 5, 1, 3)
    assert found.gap == pytest.approx(1 - near) and found.tie is tie
    agreeing = rounds_of([2, 4, 5, 7], [1, 0, 1, 2])
    assert compare_rounds([loop], agreeing, Drafter(13, near), states(), HEADS) == []


def test_states_of_another_text_are_refused():
    other = replace(states(), input_ids=torch.tensor([TEXT]) + 1)
    with pytest.raises(ValueError, match="row 0 of the states holds another text"):
        compare_rounds(
            [generation([Round(2, (3,), 1, (3, 4), Seconds())])], rounds_of([2], [1]), Drafter(13, 0.0), other, HEADS
        )
