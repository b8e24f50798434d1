"""Heads with a simple LM head: token v is the v-th direction of the hidden space."""

import pytest
import torch
from transformers import DeepseekV4Config

from hyperdflash.targets.heads import TargetHeads


@pytest.fixture
def heads() -> TargetHeads:
    draw = torch.Generator().manual_seed(0)
    heads = TargetHeads(DeepseekV4Config(hidden_size=32, vocab_size=32, hc_mult=4, num_hidden_layers=3))
    for parameter in heads.parameters():
        parameter.data.normal_(0.0, 0.3, generator=draw)
    heads.norm.weight.data.fill_(1.0)
    heads.lm_head.weight.data.copy_(torch.eye(32))
    return heads


@pytest.fixture
def residual() -> torch.Tensor:
    """[2, 12, 4, 32] in the cache's dtype."""
    return torch.randn(2, 12, 4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
