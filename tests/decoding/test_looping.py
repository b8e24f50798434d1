"""The definition of a looping answer."""

from __future__ import annotations

import pytest
import torch

from hyperdflash.decoding.metrics import ends_in_loop


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        (list(range(100)), False),
        ([], False),
        ([5], False),
        ([5] * 23, False),  # shorter than 24
        ([5] * 24, True),
        ([9, 8, 7] + [1, 2, 3] * 8, True),
        ([1, 2, 3] * 8 + [9], False),  # left the loop
        (list(range(30)) + list(range(16)) * 3, True),
        (list(range(30)) + list(range(16)) * 2 + list(range(15)), False),  # 47 of 48 tokens
        (list(range(17)) * 6, False),  # period 17
    ],
)
def test_ends_in_loop(ids, loops):
    assert ends_in_loop(ids) is loops
    assert ends_in_loop(torch.tensor(ids)) is loops


def test_the_end_token_is_not_part_of_the_tail():
    ids = [1, 2] * 20 + [99]
    assert not ends_in_loop(ids)
    assert ends_in_loop(ids, end_token_id=99)
