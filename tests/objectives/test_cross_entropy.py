import math

import pytest
import torch

from hyperdflash.objectives.cross_entropy import PositionWeighted
from hyperdflash.objectives.term import position_weights


def test_position_weights():
    assert position_weights(3, None).tolist() == [1.0, 1.0, 1.0]
    expected = torch.tensor([1.0, math.exp(-0.25), math.exp(-0.5), math.exp(-0.75)])
    torch.testing.assert_close(position_weights(4, 4.0), expected)
    counts = torch.tensor([3, 2, 0, 1])
    torch.testing.assert_close(PositionWeighted(gamma=4.0).count(counts), expected * counts)
    assert torch.equal(PositionWeighted(gamma=None).count(counts), counts.float())


def test_a_wrong_gamma_is_refused():
    for wrong in (0, -1.0, "4e0", True):
        with pytest.raises(ValueError, match=r"loss\.gamma must be a number above 0, got"):
            PositionWeighted(gamma=wrong)
