import math

import pytest
import torch

from src.loss.cross_entropy import PositionWeighted, block_cross_entropy, position_weights


def test_position_weights():
    assert position_weights(3, None).tolist() == [1.0, 1.0, 1.0]
    expected = torch.tensor([1.0, math.exp(-0.25), math.exp(-0.5), math.exp(-0.75)])
    torch.testing.assert_close(position_weights(4, 4.0), expected)
    assert torch.equal(PositionWeighted(gamma=4.0).weights(4), position_weights(4, 4.0))
    assert PositionWeighted(gamma=None).weights(2).tolist() == [1.0, 1.0]


def test_wrong_gamma():
    for wrong in (0, -1.0, "4e0", True):
        with pytest.raises(ValueError, match=r"loss\.gamma must be a number above 0, got"):
            PositionWeighted(gamma=wrong)


def test_one_worked_value():
    # Rows: slot 0 with p = 3/4 on its label (a hit), slot 2 with p = 1/4 (a miss), slot 2 with p = 3/4.
    logits = torch.tensor([[math.log(3.0), 0.0]]).repeat(3, 1)
    ce_sum, correct, count = block_cross_entropy(logits, torch.tensor([0, 1, 0]), torch.tensor([0, 2, 2]), 3)
    torch.testing.assert_close(ce_sum, torch.tensor([0.2876821, 0.0, 1.3862944 + 0.2876821]))
    assert correct.tolist() == [1, 0, 1] and count.tolist() == [1, 0, 2]


def test_bf16_logits_are_summed_in_fp32():
    torch.manual_seed(0)
    logits, labels, slots = torch.randn(50, 9).bfloat16(), torch.randint(0, 9, (50,)), torch.randint(0, 6, (50,))
    ce_sum, _, _ = block_cross_entropy(logits, labels, slots, 6)
    assert ce_sum.dtype == torch.float32
    assert torch.equal(ce_sum, block_cross_entropy(logits.float(), labels, slots, 6)[0])
