"""Counts pool over rounds and are divided once; the same sums per document."""

from __future__ import annotations

import pytest
import torch

from hyperdflash.contracts import Rounds
from hyperdflash.decoding.metrics import AcceptanceMetrics, document_counts


def rounds_of(*rows: tuple[int, int, int, int], num_slots: int = 3) -> Rounds:
    """(document, accepted, emitted, available) per round."""
    document, accepted, emitted, available = torch.tensor(rows).T
    return Rounds(document, torch.arange(len(rows)), accepted, emitted, available, num_slots)


FIRST = rounds_of((0, 3, 4, 3), (0, 0, 1, 3), (0, 1, 1, 1))
SECOND = rounds_of((1, 1, 2, 3))


def test_metrics_by_hand():
    metrics = AcceptanceMetrics(3)
    metrics.update(FIRST)
    metrics.update(SECOND)
    result = metrics.compute()
    assert float(result.tau) == 8 / 4 and float(result.accepted) == 5 / 4 and int(result.rounds) == 4
    # pooled: the mean of the two documents' taus would be (6/3 + 2/1) / 2
    assert result.survival.tolist() == [3 / 4, 1 / 4, 1 / 4]
    # slot 1 verified 4 times, 3 accepted; slot 2 by rounds 1 and 4 (round 3 has no slot 2); slot 3 by round 1
    assert result.conditional.tolist() == [3 / 4, 1 / 2, 1.0]


def test_counts_are_pooled_not_averaged():
    metrics = AcceptanceMetrics(3)
    metrics.update(rounds_of(*[(0, 0, 1, 3)] * 9))
    metrics.update(rounds_of((1, 3, 4, 3)))
    assert float(metrics.compute().tau) == pytest.approx(13 / 10)  # not (1 + 4) / 2


def test_unreached_slots_and_no_rounds_are_nan():
    metrics = AcceptanceMetrics(3)
    metrics.update(rounds_of((0, 0, 1, 3)))
    assert metrics.compute().conditional.isnan().tolist() == [False, True, True]
    assert AcceptanceMetrics(3).compute().tau.isnan()


def test_batches_pool_like_one_call_and_forward_returns_the_batch():
    whole, parts = AcceptanceMetrics(3), AcceptanceMetrics(3)
    whole.update(rounds_of((0, 3, 4, 3), (0, 0, 1, 3), (0, 1, 1, 1), (1, 1, 2, 3)))
    assert float(parts(FIRST).tau) == 2.0
    parts(SECOND)
    assert all(torch.equal(a, b) for a, b in zip(whole.compute(), parts.compute(), strict=True))
    parts.reset()
    assert int(parts.rounds_count) == 0


def test_states_are_sums():
    metrics = AcceptanceMetrics(3)
    assert {fx.__name__ for fx in metrics._reductions.values()} == {"dim_zero_sum"}


def test_a_wrong_number_of_slots_is_refused():
    with pytest.raises(ValueError, match="count 6 slots, got rounds with 3"):
        AcceptanceMetrics(6).update(FIRST)


def test_document_counts_keep_documents_without_rounds():
    counts = document_counts(rounds_of((0, 3, 4, 3), (0, 0, 1, 3), (0, 1, 1, 1), (2, 1, 2, 3)), 4)
    assert counts.emitted.tolist() == [6, 0, 2, 0] and counts.rounds.tolist() == [3, 0, 1, 0]
    assert counts.accepted.tolist() == [4, 0, 1, 0]
    assert counts.survived.tolist() == [[2, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert counts.reached.tolist() == [[3, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0]]
