import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hyperdflash.contracts import TargetStates
from hyperdflash.drafting import attention
from hyperdflash.drafting.anchors import make_blocks
from hyperdflash.drafting.flops import step_flops
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.objectives import factored_logits, objective
from hyperdflash.objectives.cross_entropy import PositionWeighted
from hyperdflash.objectives.distillation import Distillation
from hyperdflash.objectives.objective import Objective
from hyperdflash.objectives.row_values import reference_values


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 48, "num_heads": 6, "head_dim": 10}, {"convolution": 2}], ids=str)
@pytest.mark.parametrize("alpha", [0.15, 0.0], ids=["with KL", "without"])
def test_the_formula_counts_what_the_reference_multiplies(build, heads, monkeypatch, changes, alpha):
    """torch's own counter over the formulas without slices or spans; every slot supervised, all context seen."""
    monkeypatch.setattr(attention, "block_attention", attention.reference_block_attention)
    monkeypatch.setattr(factored_logits, "sweep", reference_values)
    monkeypatch.setattr(objective, "SHAPE_MULTIPLE", 1)
    drafter = build(reducer=Fc(), **changes)
    length, anchors = 128, torch.tensor([[70, 90, 120]])
    ids = torch.randint(3, 64, (1, length))
    loss_mask, lengths = torch.ones(1, length, dtype=torch.bool), torch.tensor([length])
    states = TargetStates(
        ids=("a",),
        domains=("math",),
        input_ids=ids,
        loss_mask=loss_mask,
        lengths=lengths,
        residual=torch.randn(1, length, 4, 32),
    )
    blocks = make_blocks(ids, loss_mask, lengths, anchors, torch.ones_like(anchors, dtype=torch.bool), block_size=7)
    kl = Distillation(alpha=alpha, positions=2, temperature=1.0, teacher="mean_pool")
    with FlopCounterMode(display=False) as counter:
        logits = drafter.head.logits(drafter.slots(states, heads, blocks.anchors, blocks.anchor_mask), heads)
        own = Objective({"cross_entropy": PositionWeighted(gamma=4.0), "kl": kl})
        own.loss(own.sums(logits, blocks, states.residual, heads)).backward()
    flops = step_flops(
        drafter.config,
        target_width=32,
        vocab_size=64,
        num_tokens=length,
        num_anchors=3,
        num_taught=2 if alpha else 0,
        reducer_weights=drafter.reducer.fc.weight.numel(),
        mean_visible=length,
    )
    assert flops.total == counter.get_total_flops()
