"""Hand-computed walks, and the walk against a sequential draft-verify simulation."""

from __future__ import annotations

import pytest
import torch

from hyperdflash.decoding.replay import walk


def rounds_of(accept_row: list[list[int]], start: int, end: int) -> list[tuple[int, int, int, int]]:
    """(anchor, accepted, emitted, available) of one document."""
    accept = torch.tensor(accept_row, dtype=torch.bool).unsqueeze(0)
    rounds = walk(accept, torch.tensor([start]), torch.tensor([end]))
    assert rounds.document.tolist() == [0] * len(rounds.anchor)
    return list(
        zip(
            rounds.anchor.tolist(),
            rounds.accepted.tolist(),
            rounds.emitted.tolist(),
            rounds.available.tolist(),
            strict=True,
        )
    )


def test_always_right_six_slots_clipped_at_the_end():
    # tokens after the prefill's: positions 3..13 = 11; 7 + 4, and the last round's drafts end the text: no bonus
    assert rounds_of([[1] * 6] * 14, start=2, end=13) == [(2, 6, 7, 6), (9, 4, 4, 4)]


def test_always_right_three_slots():
    # from 1 to 9: 4 + 4 exactly, each with three drafts and a bonus
    assert rounds_of([[1] * 3] * 10, start=1, end=9) == [(1, 3, 4, 3), (5, 3, 4, 3)]


def test_full_round_that_ends_on_its_last_draft_has_no_bonus():
    assert rounds_of([[1] * 3] * 5, start=1, end=4) == [(1, 3, 3, 3)]
    assert rounds_of([[1] * 6] * 8, start=1, end=7) == [(1, 6, 6, 6)]


def test_never_right_is_autoregression():
    assert rounds_of([[0] * 6] * 6, start=1, end=5) == [(1, 0, 1, 6 - 2), (2, 0, 1, 3), (3, 0, 1, 2), (4, 0, 1, 1)]


def test_sometimes_right_counts_the_leading_run_only():
    accept = [
        [0, 0, 0],
        [1, 0, 1],  # 1: one accepted, +1 bonus -> 3
        [1, 1, 1],  # never an anchor
        [0, 1, 1],  # 3: none -> 4
        [1, 1, 0],  # 4: two, +1 -> 7
        [0, 0, 0],
        [0, 0, 0],
        [1, 1, 1],  # 7: two available of three, both accepted, no bonus -> 9
        [0, 0, 0],
        [1, 1, 1],
    ]
    assert rounds_of(accept, start=1, end=9) == [(1, 1, 2, 3), (3, 0, 1, 3), (4, 2, 3, 3), (7, 2, 2, 2)]


def test_rejection_inside_the_clipped_round_still_ends_with_the_bonus():
    # one of two available slots accepted: the target's own token is the end token
    assert rounds_of([[1, 0, 1]] * 4, start=1, end=3) == [(1, 1, 2, 2)]


def test_answer_of_one_token_has_no_round():
    assert rounds_of([[1] * 6] * 4, start=3, end=3) == []


def test_two_answers_in_one_document_and_an_empty_one_beside_them():
    accept = torch.ones(2, 12, 3, dtype=torch.bool)
    document, start, end = torch.tensor([0, 0, 1]), torch.tensor([1, 8, 5]), torch.tensor([4, 11, 5])
    rounds = walk(accept, start, end, document)
    assert rounds.document.tolist() == [0, 0]
    assert rounds.anchor.tolist() == [1, 8]
    assert rounds.emitted.tolist() == [3, 3]
    nothing = walk(accept, *torch.zeros(3, 0, dtype=torch.int64))
    assert len(nothing.anchor) == 0 and nothing.num_slots == 3


@pytest.mark.parametrize("num_slots", [1, 3, 6])
@pytest.mark.parametrize("rate", [0.2, 0.6, 0.9])
def test_walk_is_sequential_speculative_decoding(num_slots: int, rate: float, sequential_loop):
    generator = torch.Generator().manual_seed(num_slots)
    batch, length = 20, 60
    text = torch.randint(0, 50, (batch, length), generator=generator)
    accept = torch.rand(batch, length, num_slots, generator=generator) < rate
    start = torch.randint(1, 30, (batch,), generator=generator)
    end = start + torch.randint(0, 30, (batch,), generator=generator)
    rounds = walk(accept, start, end)
    for row in range(batch):

        def draft(anchor: int, row: int = row) -> list[int]:
            tokens = [int(text[row, min(anchor + k, length - 1)]) for k in range(1, num_slots + 1)]
            return [t if ok else -1 for t, ok in zip(tokens, accept[row, anchor].tolist(), strict=True)]

        expected = sequential_loop(draft, text[row].tolist(), num_slots, int(start[row]), int(end[row]))
        mine = rounds.document == row
        got = list(
            zip(
                rounds.anchor[mine].tolist(),
                rounds.accepted[mine].tolist(),
                rounds.emitted[mine].tolist(),
                strict=True,
            )
        )
        assert got == expected
        assert int(rounds.emitted[mine].sum()) == int(end[row] - start[row])
