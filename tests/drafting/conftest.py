"""A target's heads without the target, and random states in the cache's dtype."""

import pytest
import torch
from transformers import DeepseekV4Config

from hyperdflash.contracts import TargetStates
from hyperdflash.drafting.conditioning import PreHcHead
from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.heads.lm_head import LMHead
from hyperdflash.drafting.inputs import Inputs
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.targets.heads import TargetHeads


@pytest.fixture
def heads() -> TargetHeads:
    draw = torch.Generator().manual_seed(0)
    heads = TargetHeads(DeepseekV4Config(hidden_size=32, vocab_size=64, hc_mult=4, num_hidden_layers=3))
    for parameter in heads.parameters():
        parameter.data.normal_(0.0, 0.3, generator=draw)
    heads.norm.weight.data.fill_(1.0)
    return heads


@pytest.fixture
def states() -> TargetStates:
    """Three documents of 40, 31 and 24 tokens, answers from position 8; layers 0, 2, 5 tapped."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([40, 31, 24])
    positions = torch.arange(40)
    return TargetStates(
        ids=("a", "b", "c"),
        domains=("math", "code", "chat"),
        input_ids=torch.randint(3, 64, (3, 40), generator=draw),
        loss_mask=(positions >= 8) & (positions < lengths[:, None]),
        lengths=lengths,
        residual=torch.randn(3, 40, 4, 32, generator=draw).bfloat16(),
        layers=torch.randn(3, 40, 3, 4, 32, generator=draw).bfloat16(),
        layer_ids=(0, 2, 5),
    )


@pytest.fixture
def sizes() -> dict[str, int]:
    return dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, block_size=7)


@pytest.fixture
def build(heads, sizes):
    """build(conditioning=, reducer=, any part, any drafter size) -> Drafter; weights large enough to matter."""

    def _build(conditioning=None, reducer=None, head=None, layout="full", inputs=None, lead=None, load_mtp=None, **changes):
        parts = DrafterParts(
            conditioning=conditioning or PreHcHead(),
            reducer=reducer or HcGate(),
            head=head or LMHead(),
            layout=layout,
            heads=heads,
            mask_token_id=2,
            inputs=inputs or Inputs(),
            lead=lead,
            load_mtp=load_mtp,
        )
        config = DrafterConfig(**{**sizes, "initializer_range": 0.2, **changes})
        return config.build(parts, torch.Generator().manual_seed(7))

    return _build
