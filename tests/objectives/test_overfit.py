"""Blocks, drafter and loss together: after overfitting one batch, every slot predicts its label."""

import torch

from hyperdflash.contracts import TargetStates
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.anchors import BlockSampler, all_anchors, make_blocks
from hyperdflash.drafting.conditioning import PreHcHead
from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.objectives.cross_entropy import PositionWeighted
from hyperdflash.objectives.objective import Objective

END = 1


def test_every_full_round_accepts_six_and_every_slot_learns_the_end_token(heads):
    draw = torch.Generator().manual_seed(3)
    lengths = torch.tensor([24, 20])
    ids = torch.randint(3, 32, (2, 24), generator=draw)
    ids[0, 23] = ids[1, 19] = END
    loss_mask = (torch.arange(24) >= 4).expand(2, 24)
    residual = torch.randn(2, 24, 4, 32, generator=draw).bfloat16()
    states = TargetStates(
        ids=("a", "b"), domains=("math", "math"), input_ids=ids, loss_mask=loss_mask, lengths=lengths, residual=residual
    )
    drafter = DrafterConfig(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64, block_size=7).build(
        DrafterParts(conditioning=PreHcHead(), reducer=HcGate(), heads=heads, mask_token_id=2), draw
    )
    frozen = {name: value.clone() for name, value in heads.state_dict().items()}
    objective = Objective({"cross_entropy": PositionWeighted(gamma=4.0)})
    sampler = BlockSampler(num_anchors=12)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(250):
        blocks = sampler.sample(ids, loss_mask, lengths, 7, draw)
        logits = drafter.head.logits(drafter.slots(states, heads, blocks.anchors, blocks.anchor_mask), heads)
        loss = objective.loss(objective.sums(logits, blocks, residual, heads))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    blocks = make_blocks(ids, loss_mask, lengths, *all_anchors(loss_mask, lengths), block_size=7)
    with torch.no_grad():
        slots = drafter.slots(states, heads, blocks.anchors, blocks.anchor_mask)
        drafted = drafter.head.logits(slots, heads).dense().argmax(dim=-1)
    hits = (drafted == blocks.labels) & blocks.label_mask
    assert torch.equal(hits, blocks.label_mask)
    ends = hits & (blocks.labels == END)
    assert ends.sum(dim=1).tolist() == [[1] * 6, [1] * 6]  # once in every slot of both documents
    assert all(torch.equal(value, frozen[name]) for name, value in heads.state_dict().items())

    rounds = replay(drafter.eval(), states, heads, temperature=0.0)
    full = rounds.available == 6
    assert full.any() and (rounds.accepted[full] == 6).all()
    assert torch.equal(rounds.accepted[~full], rounds.available[~full])
    # 19 and 15 tokens after the prefill's: rounds of seven, the last one clipped
    assert rounds.emitted.tolist() == [7, 7, 5, 7, 7, 1]
