from dataclasses import replace

import pytest
import torch

from hyperdflash.drafting.conditioning import Layers, PostHcHead, PreHcHead
from hyperdflash.drafting.layer_ids import default_layer_ids


def test_pre_hc_head_is_the_cached_residual(states, heads):
    source = PreHcHead()
    assert source.layer_ids == () and source.num_streams(heads) == 4
    assert source.gather(states, heads) is states.final


def test_post_hc_head_is_what_the_lm_head_reads(states, heads):
    source = PostHcHead()
    streams = source.gather(states, heads)
    assert source.layer_ids == () and streams.shape == (3, 40, source.num_streams(heads), 32)
    assert torch.equal(streams[:, :, 0], heads.norm(heads.hc_head(states.final.float())))


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
def test_wrong_layers(settings, sentence):
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
