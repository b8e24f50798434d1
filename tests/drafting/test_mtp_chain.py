"""The chained MTP drafter against a layer that runs from scratch for each anchor and slot."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV4Config

from hyperdflash.contracts import TargetStates
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.targets.deepseek_v4.mtp import MTPBlock
from hyperdflash.targets.heads import TargetHeads


def tiny_config(window: int) -> DeepseekV4Config:
    config = DeepseekV4Config(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=16,
        o_lora_rank=8,
        o_groups=2,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        sliding_window=window,
        hc_mult=4,
        max_position_embeddings=256,
        layer_types=["sliding_attention", "sliding_attention"],
        mlp_layer_types=["moe", "moe"],
        index_topk=16,
        index_n_heads=2,
        index_head_dim=16,
    )
    config._attn_implementation = "eager"
    return config


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = 1 + 0.1 * value if name.endswith("norm.weight") else value


def make(window: int, batch: int = 3, length: int = 40):
    generator = torch.Generator().manual_seed(window)
    config = tiny_config(window)
    block, heads = MTPBlock(config).eval(), TargetHeads(config)
    randomise(block, generator)
    randomise(heads, generator)
    lengths = torch.tensor([length, length - 9, length - 20])[:batch]
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row, first in enumerate([3, 12, 1][:batch]):
        mask[row, first : lengths[row]] = True
    states = TargetStates(
        ids=tuple(f"d{i}" for i in range(batch)),
        domains=("math",) * batch,
        input_ids=torch.randint(0, 48, (batch, length), generator=generator),
        loss_mask=mask,
        lengths=lengths,
        residual=torch.randn(batch, length, 4, 32, generator=generator).to(torch.bfloat16),
    )
    return block, heads, states


@torch.no_grad()
def brute_force(block, heads, states, row: int, anchor: int, num_slots: int) -> torch.Tensor:
    """Slots 1..S [S, D]: every slot reruns the whole list of (H, embedding) pairs, with a full mask."""
    residuals = [h.float() for h in states.residual[row, :anchor]]  # H of indices 0..anchor-1
    hidden = []
    for slot in range(1, num_slots + 1):
        n = anchor + slot - 1  # indices 0..anchor+slot-2
        embeds = heads.embed(states.input_ids[row, 1 : n + 1]).unsqueeze(0)
        out = block.forward_residual(torch.stack(residuals).unsqueeze(0), embeds)
        hidden.append(block.head(out)[0, -1])
        residuals.append(out[0, -1])
    return torch.stack(hidden)


def forward_residual(block, residual, embeds):
    """One pass without a cache, with a mask built entry by entry."""
    n = residual.shape[1]
    mask = torch.full((1, 1, n, n), float("-inf"))
    for i in range(n):
        for j in range(max(0, i - block.sliding_window + 1), i + 1):
            mask[0, 0, i, j] = 0.0
    return block.run(residual, embeds, torch.arange(n).unsqueeze(0), mask)[0]


@pytest.mark.parametrize("num_slots", [3, 6])
@pytest.mark.parametrize("window", [1, 3, 8, 64])
def test_chain_is_the_brute_force_one(window: int, num_slots: int, monkeypatch):
    monkeypatch.setattr(MTPBlock, "forward_residual", forward_residual, raising=False)
    block, heads, states = make(window)
    anchors = torch.tensor([list(range(3, 33)), list(range(12, 30)) + [0] * 12, [1, 2, 18, 5, 9] + [0] * 25])
    anchor_mask = torch.ones(3, 30, dtype=torch.bool)
    anchor_mask[1, 18:], anchor_mask[2, 5:] = False, False
    drafter = MTPChain(block, num_slots, indices_per_pass=11, rows_per_pass=32)
    hidden = drafter.slots(states, heads, anchors, anchor_mask).features
    assert hidden.shape == (3, 30, num_slots, 32)
    for row, column in anchor_mask.nonzero().tolist()[::3]:
        anchor = int(anchors[row, column])
        expected = brute_force(block, heads, states, row, anchor, num_slots)
        assert torch.allclose(hidden[row, column], expected, atol=1e-5), (row, anchor)


def test_passes_do_not_change_the_answer():
    block, heads, states = make(8)
    anchors = torch.arange(12, 28).expand(3, -1)
    mask = torch.ones_like(anchors, dtype=torch.bool)
    whole = MTPChain(block, 4).slots(states, heads, anchors, mask).features
    small = MTPChain(block, 4, indices_per_pass=5, rows_per_pass=1)
    one_by_one = torch.cat([small.slots(states, heads, anchors[:, i : i + 1], mask[:, :1]).features for i in range(16)], dim=1)
    assert torch.allclose(whole, one_by_one, atol=1e-5)


def test_a_slot_sees_no_state_of_its_anchor_or_later():
    block, heads, states = make(8, batch=1)
    anchors, mask = torch.tensor([[20]]), torch.ones(1, 1, dtype=torch.bool)
    before = MTPChain(block, 6).slots(states, heads, anchors, mask).features
    states.residual[:, 20:] = 7.0
    states.input_ids[:, 26:] = 0  # slot 6 reads x[25] last
    assert torch.equal(before, MTPChain(block, 6).slots(states, heads, anchors, mask).features)
    states.residual[:, 19] = 7.0
    assert not torch.allclose(before, MTPChain(block, 6).slots(states, heads, anchors, mask).features)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replay_of_the_mtp_chain(temperature: float):
    block, heads, states = make(8)
    three, six = (replay(MTPChain(block, s), states, heads, temperature) for s in (3, 6))
    answered = int((states.loss_mask.sum(1) - 1).sum())
    assert int(three.emitted.sum()) == int(six.emitted.sum()) == answered
    # the first rounds of a text start at the same anchor: the first three slots are the same draft
    first3, first6 = three.accepted[three.anchor == 3], six.accepted[six.anchor == 3]
    assert first3[0] == first6[0].clamp(max=3)


def test_wrong_arguments_are_refused():
    block, heads, states = make(8)
    with pytest.raises(ValueError, match="at least one drafted step"):
        MTPChain(block, 0)
    with pytest.raises(ValueError, match="position 0"):
        MTPChain(block, 3).slots(states, heads, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.bool))


def test_keys_are_those_of_a_whole_run():
    """``keys`` alone gives the keys that ``run`` gives beside its residual."""
    block, heads, states = make(window=8)
    embeds, index = heads.embed(states.next_ids), torch.arange(states.input_ids.shape[1]).expand(len(states.ids), -1)
    _, keys = block.run(states.residual, embeds, index, None)
    torch.testing.assert_close(block.keys(states.residual, embeds, index), keys)
