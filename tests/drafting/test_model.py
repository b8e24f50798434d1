from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV4Config

from hyperdflash.drafting import drafter as model
from hyperdflash.drafting.anchors import all_anchors
from hyperdflash.drafting.attention import context_mask
from hyperdflash.drafting.conditioning import Layers, PostHcHead, PreHcHead
from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.drafter import DraftLayer
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.drafting.reducers.mean import Mean
from hyperdflash.targets.heads import TargetHeads

LAYERS = Layers(layer_ids=[0, 5])
ANCHORS = torch.tensor([[9, 10, 20], [9, 16, 29], [8, 20, 22]])
MASK = torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("conditioning", "reducer"),
    [
        (PreHcHead(), HcGate()),
        (PreHcHead(), HcGate(path_norm=False, init="random")),
        (PreHcHead(), Fc()),
        (PreHcHead(), Mean()),
        (PostHcHead(), Fc()),
        (PostHcHead(), Mean()),
        (LAYERS, Fc()),
        (LAYERS, Mean()),
        (replace(LAYERS, paths="flat"), Fc()),
    ],
)
def test_every_pairing_runs_and_every_parameter_learns(build, heads, states, conditioning, reducer):
    drafter = build(conditioning, reducer)
    hidden = drafter.slots(states, heads, ANCHORS, MASK).features
    assert hidden.shape == (3, 3, 6, 32) and hidden.dtype == torch.float32
    hidden.square().mul(torch.arange(32)).sum().backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None and parameter.grad.any(), name
    assert set(drafter.state_dict()) == {name for name, _ in drafter.named_parameters()}
    assert all(p.grad is None for p in heads.parameters())


def test_a_block_sees_the_states_before_its_anchor_only(build, heads, states):
    for conditioning, reducer in ((PreHcHead(), HcGate()), (LAYERS, Fc())):
        drafter = build(conditioning, reducer)
        before = drafter.slots(states, heads, ANCHORS, MASK).features
        for shift in (-9, -2, -1, 0, 1, 2, 11):
            position = 20 + shift
            residual, layers = states.residual.clone(), states.layers.clone()
            residual[2, position] += 3.0
            layers[2, position] += 3.0 * torch.randn(3, 4, 32).bfloat16()
            after = drafter.slots(replace(states, residual=residual, layers=layers), heads, ANCHORS, MASK).features
            assert torch.equal(after[:2], before[:2])  # another document
            changed = (after[2] != before[2]).flatten(1).any(dim=1)
            assert changed.tolist() == [position < anchor for anchor in (8, 20, 22)]


def test_a_block_sees_its_own_anchor_token_and_no_other_block(build, heads, states):
    drafter = build()
    before = drafter.slots(states, heads, ANCHORS, MASK).features
    moved = ANCHORS.clone()
    moved[0, 0], moved[0, 2] = 30, 11
    after = drafter.slots(states, heads, moved, MASK).features
    assert torch.equal(after[0, 1], before[0, 1]) and torch.equal(after[1:], before[1:])

    ids = states.input_ids.clone()
    ids[0, 10] = (ids[0, 10] + 1) % 64
    ids[0, 11:] = 5  # tokens after an anchor are what it has to predict
    ids[0, :9] = 5
    after = drafter.slots(replace(states, input_ids=ids), heads, ANCHORS, MASK).features
    assert torch.equal(after[0, 0], before[0, 0])  # anchor 9
    assert (after[0, 1] != before[0, 1]).any(dim=-1).all()  # anchor 10: every slot sees the anchor's token


def test_slots_see_each_other_in_both_directions(build, heads, states):
    drafter = build(num_layers=1)
    kv = drafter.project_context(drafter.context(states, heads), torch.arange(40))
    visible = torch.arange(40) < ANCHORS[..., None]
    ids = states.input_ids.gather(1, ANCHORS)[..., None]
    before = drafter.draft(ids, ANCHORS, kv, visible, heads)
    embed = drafter.embed_blocks

    def disturbed(*inputs):
        x = embed(*inputs)
        x[:, :, 4] += 1.0
        return x

    drafter.embed_blocks = disturbed
    after = drafter.draft(ids, ANCHORS, kv, visible, heads)
    assert (after != before).any(dim=-1).all()


def test_in_a_causal_layout_slots_see_only_earlier_ones(build, heads, states):
    drafter = build(num_layers=1, layout="causal")
    kv = drafter.project_context(drafter.context(states, heads), torch.arange(40))
    visible = torch.arange(40) < ANCHORS[..., None]
    ids = states.input_ids.gather(1, ANCHORS)[..., None]
    before, embed = drafter.draft(ids, ANCHORS, kv, visible, heads), drafter.embed_blocks

    def disturbed(*inputs):
        x = embed(*inputs)
        x[:, :, 4] += 1.0
        return x

    drafter.embed_blocks = disturbed
    after = drafter.draft(ids, ANCHORS, kv, visible, heads)
    changed = (after != before).any(dim=-1)
    assert not changed[..., :3].any() and changed[..., 3:].all()  # slots 1 to 3, and 4 to 6
    full = build(num_layers=1).slots(states, heads, ANCHORS, MASK).features
    assert not torch.allclose(full[..., 0, :], before[..., 0, :])


def test_batch_padding_and_anchor_padding_do_not_matter(build, heads, states):
    drafter = build()
    whole = drafter.slots(states, heads, ANCHORS, MASK).features
    mask = MASK.clone()
    mask[0, 1] = False
    masked = drafter.slots(states, heads, ANCHORS, mask).features
    assert not masked[0, 1].any()
    assert torch.equal(masked[mask], whole[mask])
    alone = replace(
        states,
        **{name: getattr(states, name)[2:, :24] for name in ("input_ids", "loss_mask", "residual", "layers")},
        lengths=states.lengths[2:],
    )
    torch.testing.assert_close(drafter.slots(alone, heads, ANCHORS[2:], MASK[2:]).features, whole[2:])


def test_incremental_context_equals_the_whole(build, heads, states):
    """A decoding loop projects only new states, appends them, and drafts from its own ids."""
    drafter = build()
    whole = drafter.slots(states, heads, ANCHORS, MASK).features
    pieces = []
    for start, stop in ((0, 8), (8, 9), (9, 13), (13, 22)):
        part = replace(states, residual=states.residual[:, start:stop])
        pieces.append(drafter.project_context(drafter.context(part, heads), torch.arange(start, stop)))
    kv = [tuple(torch.cat(parts, dim=1) for parts in zip(*layer, strict=True)) for layer in zip(*pieces, strict=True)]
    anchors = torch.tensor([[20], [16], [22]])
    visible = torch.arange(22) < anchors[..., None]
    hidden = drafter.draft(states.input_ids.gather(1, anchors)[..., None], anchors, kv, visible, heads)
    torch.testing.assert_close(hidden[:, 0], torch.stack([whole[0, 2], whole[1, 1], whole[2, 2]]))


def test_with_a_window_a_loop_may_drop_older_states(build, heads, states):
    drafter = build(context_window=5)
    whole = drafter.slots(states, heads, ANCHORS, MASK).features
    assert not torch.equal(whole, build().slots(states, heads, ANCHORS, MASK).features)
    anchors = torch.tensor([[20], [16], [22]])
    for row, anchor in enumerate(anchors.flatten().tolist()):
        newest = slice(anchor - 5, anchor)
        part = replace(states, residual=states.residual[row : row + 1, newest])
        positions = torch.arange(anchor - 5, anchor)
        kv = drafter.project_context(drafter.context(part, heads), positions)
        visible = context_mask(anchors[row : row + 1], positions, drafter.config.context_window)
        assert visible.all()
        token = states.input_ids[row, anchor].view(1, 1, 1)
        hidden = drafter.draft(token, anchors[row : row + 1], kv, visible, heads)
        torch.testing.assert_close(hidden[0, 0], whole[row, (2, 1, 2)[row]])


def gradients(drafter, states, heads):
    hidden = drafter.slots(states, heads, ANCHORS, MASK).features
    names, parameters = zip(*drafter.named_parameters(), strict=True)
    loss = (hidden * torch.arange(32.0)).square().sum()
    return hidden, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_gradient_checkpointing_changes_only_what_is_saved(build, heads, states, monkeypatch):
    hidden, expected = gradients(build(), states, heads)
    calls, forward = [], DraftLayer.forward
    monkeypatch.setattr(DraftLayer, "forward", lambda self, *rest: calls.append(1) or forward(self, *rest))
    again, got = gradients(build(gradient_checkpointing=True), states, heads)
    assert len(calls) == 2 * 2  # both layers, forward and once more
    assert torch.equal(again, hidden)
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name


def test_compiled_layers_draft_the_same(build, heads, states, monkeypatch):
    """The layers are traced but run eagerly, because generating code would take minutes."""
    hidden, expected = gradients(build(), states, heads)
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    torch._dynamo.reset()
    drafter = build(compile=True)
    again, got = gradients(drafter, states, heads)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    torch.testing.assert_close(again, hidden)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-3)
    assert set(drafter.state_dict()) == set(build().state_dict())


def test_only_context_that_an_anchor_sees_is_reduced(build, heads, states, monkeypatch):
    drafter = build()
    monkeypatch.setattr(model, "SHAPE_MULTIPLE", 8)
    whole = drafter.slots(states, heads, ANCHORS, MASK).features
    reduced, reduce = [], drafter.reducer.forward
    monkeypatch.setattr(drafter.reducer, "forward", lambda streams: reduced.append(streams.shape[1]) or reduce(streams))
    early = ANCHORS.clamp(max=17)
    drafter.slots(states, heads, early, MASK)
    assert reduced == [24]  # the newest anchor is 17, rounded up
    monkeypatch.setattr(model, "SHAPE_MULTIPLE", 64)
    torch.testing.assert_close(drafter.slots(states, heads, ANCHORS, MASK).features, whole)
    assert reduced == [24, 64]  # of 40: filled up


def test_without_gradients_a_few_anchors_at_a_time_share_one_projection_of_the_context(build, heads, states, monkeypatch):
    drafter, drafted = build(), []
    whole = drafter.slots(states, heads, ANCHORS, MASK).features
    monkeypatch.setattr(model, "ANCHORS_PER_PASS", 2)
    projected, project = [], drafter.project_context
    drafter.layers[0].register_forward_pre_hook(lambda _, args: drafted.append(args[0].shape[1]))
    monkeypatch.setattr(drafter, "project_context", lambda *args: projected.append(1) or project(*args))
    torch.testing.assert_close(drafter.slots(states, heads, ANCHORS, MASK).features, whole)
    with torch.no_grad():
        torch.testing.assert_close(drafter.slots(states, heads, ANCHORS, MASK).features, whole)
    assert drafted == [3, 2, 1] and len(projected) == 2


def test_another_width_gets_projections(build, heads, states):
    drafter = build(reducer=Fc(), hidden_size=48)
    assert drafter.embed_proj.weight.shape == (48, 32) and drafter.out_proj.weight.shape == (32, 48)
    assert drafter.slots(states, heads, ANCHORS, MASK).features.shape == (3, 3, 6, 32)
    assert drafter.context(states, heads).shape == (3, 40, 48)
    assert build().embed_proj is None


def test_weights_come_from_the_generator_alone(build):
    state = torch.get_rng_state()
    first = build().state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    for name, value in build().state_dict().items():
        assert torch.equal(value, first[name]) and value.isfinite().all(), name


def test_bf16_drafter_and_autocast(build, heads, states):
    full = build().slots(states, heads, ANCHORS, MASK).features
    half = build().bfloat16().slots(states, heads, ANCHORS, MASK).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = build().slots(states, heads, ANCHORS, MASK).features
    assert half.dtype == torch.bfloat16
    for other in (half, mixed):
        cosine = torch.nn.functional.cosine_similarity(other.float().flatten(1), full.flatten(1))
        assert cosine.min() > 0.99


def test_no_anchor_at_all(build, heads, states):
    silent = replace(states, loss_mask=torch.zeros_like(states.loss_mask))
    hidden = build().slots(silent, heads, *all_anchors(silent.loss_mask, silent.lengths)).features
    assert hidden.shape == (3, 1, 6, 32) and not hidden.any()


def test_paper_sizes_on_the_meta_device():
    with torch.device("meta"):
        heads = TargetHeads(DeepseekV4Config())
    sizes = DrafterConfig(num_layers=5, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=12288, block_size=7)
    drafter = sizes.build(DrafterParts(conditioning=PreHcHead(), reducer=HcGate(), heads=heads, mask_token_id=128799))
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 128
    per_layer = attention + 3 * 4096 * 12288 + 2 * 4096
    assert sum(p.numel() for p in drafter.parameters()) == 5 * per_layer + 2 * 4096 + 65_541 + 16_384


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(num_heads=0), "drafter.num_heads must be a positive integer, got 0"),
        (dict(num_kv_heads=3), "drafter.num_heads must be a multiple of drafter.num_kv_heads .3., got 4"),
        (dict(head_dim=7), "drafter.head_dim must be even"),
        (dict(block_size=1), "drafter.block_size must be at least 2"),
        (dict(hidden_size=-4), "drafter.hidden_size must be a positive integer, got -4"),
        (dict(context_window=0), "drafter.context_window must be a positive integer, got 0"),
        (dict(compile="yes"), "drafter.compile must be true or false, got 'yes'"),
        (dict(gradient_checkpointing=1), "drafter.gradient_checkpointing must be true or false, got 1"),
        (dict(rope_theta="1e6"), "drafter.rope_theta must be a number above 0, got the string '1e6'"),
    ],
)
def test_wrong_sizes_are_refused(sizes, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        DrafterConfig(**{**sizes, **change})


def test_a_wrong_build_is_refused(heads, sizes):
    parts = dict(conditioning=PreHcHead(), reducer=HcGate(), heads=heads)
    with pytest.raises(ValueError, match=r"mask_token_id must be in 0\.\.63, got 64"):
        DrafterConfig(**sizes).build(DrafterParts(**parts, mask_token_id=64), torch.Generator())
    with pytest.raises(ValueError, match=r"needs a torch\.Generator"):
        DrafterConfig(**sizes).build(DrafterParts(**parts, mask_token_id=2))
