from dataclasses import replace

import pytest
import torch

from hyperdflash.drafting.conditioning import Layers, PostHcHead, PreHcHead
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.drafting.taps_and_tokens import TapsAndTokens
from hyperdflash.identity import default_layer_ids


def test_pre_hc_head_is_the_cached_residual(states, heads):
    source = PreHcHead()
    assert source.layer_ids == () and source.num_streams(heads) == 4
    assert source.gather(states, heads) is states.residual


def test_post_hc_head_is_what_the_lm_head_reads(states, heads):
    source = PostHcHead()
    streams = source.gather(states, heads)
    assert source.layer_ids == () and streams.shape == (3, 40, source.num_streams(heads), 32)
    assert torch.equal(streams[:, :, 0], heads.norm(heads.hc_head(states.residual.float())))


def test_layers_select_their_taps_in_their_own_order(states, heads):
    mean, flat = Layers(layer_ids=[5, 0]), Layers(layer_ids=[5, 0], paths="flat")
    assert mean.layer_ids == (5, 0)
    streams = mean.gather(states, heads)
    assert streams.shape == (3, 40, mean.num_streams(heads), 32) == (3, 40, 2, 32)
    assert torch.equal(streams[:, :, 0], states.layers[:, :, 2].mean(dim=2))
    streams = flat.gather(states, heads)
    assert streams.shape == (3, 40, flat.num_streams(heads), 32) == (3, 40, 8, 32)
    assert torch.equal(streams[:, :, 3], states.layers[:, :, 2, 3])
    assert torch.equal(streams[:, :, 4], states.layers[:, :, 0, 0])


def test_missing_taps_are_named(states, heads):
    with pytest.raises(ValueError, match=r"reads target layers \[1, 5\], these states hold \[0, 2, 5\]: capture"):
        Layers(layer_ids=[1, 5]).gather(states, heads)
    with pytest.raises(ValueError, match=r"these states hold \[\]"):
        Layers(layer_ids=[1]).gather(replace(states, layers=None, layer_ids=()), heads)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(layer_ids=[]), "layer_ids must be a list of layer numbers"),
        (dict(layer_ids="1,5"), "layer_ids must be a list of layer numbers"),
        (dict(layer_ids=[1, 1]), "must name each layer once"),
        (dict(layer_ids=[-1]), "must be an integer of at least 0, got -1"),
        (dict(layer_ids=[1], paths="max"), "conditioning.paths must be mean or flat, got 'max'"),
    ],
)
def test_wrong_layers_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Layers(**settings)


def test_default_layer_ids():
    assert default_layer_ids(43, 5) == (1, 11, 20, 30, 40)
    assert default_layer_ids(8, 2) == (1, 5)
    assert default_layer_ids(8, 5) == (1, 2, 3, 4, 5)
    assert default_layer_ids(43, 1) == (21,)
    for layers, taps in ((8, 6), (3, 2), (43, 0)):
        with pytest.raises(ValueError, match="num_taps must be in 1"):
            default_layer_ids(layers, taps)


def test_taps_stand_beside_the_embedding_of_the_next_token(states, heads):
    source = TapsAndTokens(layer_ids=[0, 5])
    streams = source.gather(states, heads)
    assert source.num_streams(heads) == 3 and streams.shape == (3, 40, 3, 32)
    assert torch.equal(streams[:, :, :2], Layers(layer_ids=[0, 5]).gather(states, heads))
    assert torch.equal(streams[:, :-1, 2], heads.embed(states.input_ids[:, 1:]).to(streams.dtype))
    known = replace(states, next_id=torch.tensor([7, 8, 9]))
    assert torch.equal(source.gather(known, heads)[:, -1, 2], heads.embed(known.next_id).to(streams.dtype))


def test_without_the_tokens_the_drafter_is_that_of_the_layers(build, heads, states):
    """At token_scale 0 with the same weights for the taps."""
    anchors, mask = torch.tensor([[9, 20], [9, 29], [8, 22]]), torch.ones(3, 2, dtype=torch.bool)
    plain = build(Layers(layer_ids=[0, 5]), Fc())
    joined = build(TapsAndTokens(layer_ids=[0, 5], token_scale=0.0), Fc())
    weights = plain.state_dict()
    weights["reducer.fc.weight"] = torch.cat([weights["reducer.fc.weight"], torch.randn(32, 32)], dim=1)
    joined.load_state_dict(weights)
    expected, got = (module.slots(states, heads, anchors, mask).features for module in (plain, joined))
    torch.testing.assert_close(got, expected)


def test_a_block_sees_its_anchors_token_in_the_context_and_no_later_one(build, heads, states):
    drafter = build(TapsAndTokens(layer_ids=[0, 5]), Fc(), num_layers=1)
    context = drafter.context(states, heads)
    ids = states.input_ids.clone()
    ids[:, 20] = (ids[:, 20] + 1) % 64
    changed = (drafter.context(replace(states, input_ids=ids), heads) != context).any(dim=-1)
    assert changed[:, 19].all() and changed.sum() == 3  # position 19 alone, which anchor 20 sees and anchor 19 does not
