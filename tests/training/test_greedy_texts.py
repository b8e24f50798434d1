"""Differences of greedy texts are found at their position, and are ties only within the gap."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hyperdflash.evaluation.decoding import compare_greedy


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
    gap = pytest.approx(0.0004, abs=1e-5)
    assert found == {"position": 1, "expected_id": 1, "got_id": 2, "gap": gap, "tie": True}
    assert model.texts == [[7, 8, 3]]
    assert not compare_greedy(model, [7], [3, 1], [3, 2], tolerance=1e-4)["tie"]
    # both far below the best token: no tie, however near to each other
    assert not compare_greedy(Model([0.5, 2.0, 3.0, 0.5]), [7], [0], [3])["tie"]


def test_a_shorter_text_is_no_tie():
    found = compare_greedy(Model([0.0] * 4), [7], [3, 1, 2], [3, 1])
    assert found == {"position": 2, "expected_id": 2, "got_id": None, "gap": float("inf"), "tie": False}
