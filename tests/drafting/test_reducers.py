import io

import pytest
import torch
from rich.console import Console

from hyperdflash.drafting.conditioning import Layers, PostHcHead, PreHcHead
from hyperdflash.drafting.reducers import hc_gate
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.drafting.reducers.mean import Mean
from hyperdflash.drafting.table1 import num_parameters, table1

LAYERS = Layers(layer_ids=[0, 2])


def new(config, heads, conditioning=None, hidden_size=32):
    return config.build(conditioning or PreHcHead(), heads, hidden_size)


def test_hc_gate_without_path_norm_is_hc_head_bit_for_bit(heads, build, states):
    reducer = build(reducer=HcGate(path_norm=False)).reducer
    for scale in (1.0, 30.0, 1e-3):
        residual = states.residual.float() * scale
        assert torch.equal(reducer(residual), heads.hc_head(residual))


def test_hc_gate_starts_as_a_copy_of_hc_head(heads, build):
    reducer = build().reducer
    for name in ("hc_fn", "hc_base", "hc_scale"):
        own, target = getattr(reducer, name), getattr(heads.hc_head, name)
        assert torch.equal(own, target) and own.data_ptr() != target.data_ptr() and own.requires_grad
    assert torch.equal(reducer.path_norm.weight, torch.ones(4, 32))


def test_hc_gate_random_init_as_transformers_does(build):
    reducer = build(reducer=HcGate(init="random")).reducer
    assert torch.equal(reducer.hc_base, torch.zeros(4)) and torch.equal(reducer.hc_scale, torch.ones(1))
    assert 0.015 < reducer.hc_fn.std() < 0.025  # initializer_range 0.02
    assert torch.equal(reducer.hc_fn, build(reducer=HcGate(init="random")).reducer.hc_fn)


def test_hc_gate_reads_the_raw_residual_and_norms_only_the_summed_paths(heads, build, states):
    reducer = build().reducer
    torch.nn.init.normal_(reducer.path_norm.weight)
    residual = states.residual.float()
    flat = residual.flatten(2)
    flat = flat * (flat.pow(2).mean(-1, keepdim=True) + heads.config.rms_norm_eps).rsqrt()
    hc = heads.hc_head
    gates = torch.sigmoid(flat @ hc.hc_fn.T * hc.hc_scale + hc.hc_base) + heads.config.hc_eps
    expected = torch.zeros(3, 40, 32)
    for path in range(4):
        state = residual[:, :, path]
        normed = state * (state.pow(2).mean(-1, keepdim=True) + heads.config.rms_norm_eps).rsqrt()
        expected += gates[:, :, path, None] * normed * reducer.path_norm.weight[path]
    torch.testing.assert_close(reducer(residual), expected)


def test_fc_and_mean(heads, build, states):
    streams = states.residual.float()
    fc = build(reducer=Fc()).reducer
    weights = fc.fc.weight.chunk(4, dim=1)  # stream j meets columns j * D to (j + 1) * D
    torch.testing.assert_close(fc(streams), sum(streams[:, :, j] @ weights[j].T for j in range(4)))
    mean = new(Mean(), heads)
    assert not list(mean.parameters())
    assert torch.equal(mean(streams), streams.mean(dim=2))


def test_hc_gate_reduces_a_few_tokens_at_a_time(build, states, monkeypatch):
    reducer = build().reducer
    whole = reducer(states.residual)
    assert whole.dtype == torch.float32  # of states in bf16, which are never copied as a whole
    names, parameters = zip(*reducer.named_parameters(), strict=True)
    expected = torch.autograd.grad(whole.square().sum(), parameters)
    monkeypatch.setattr(hc_gate, "TOKENS", 7)
    parts = reducer(states.residual)
    torch.testing.assert_close(parts, whole)
    for name, one, two in zip(names, torch.autograd.grad(parts.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(one, two, msg=name, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reducer", [Fc(), HcGate()], ids=["fc", "hc_gate"])
def test_reducers_read_states_in_the_caches_dtype(build, states, reducer):
    """bf16 states give the same as their values in fp32; under autocast nothing converts them to fp32 first."""
    made = build(reducer=reducer).reducer
    torch.testing.assert_close(made(states.residual), made(states.residual.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = made(states.residual)
    torch.testing.assert_close(mixed.float(), made(states.residual), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("conditioning", [PostHcHead(), LAYERS], ids=["post_hc_head", "layers"])
def test_hc_gate_names_fc_for_another_source(heads, conditioning):
    with pytest.raises(ValueError, match=rf"needs conditioning=pre_hc_head, got .*={conditioning.name}: run with reducer=fc"):
        new(HcGate(), heads, conditioning)


@pytest.mark.parametrize("config", [HcGate(), Mean()], ids=["hc_gate", "mean"])
def test_other_widths_name_fc(heads, config):
    with pytest.raises(ValueError, match=r"equal to the target's 32, got 48: run with reducer=fc"):
        new(config, heads, hidden_size=48)


@pytest.mark.parametrize("config", [HcGate, Fc, Mean])
def test_num_streams_is_checked(heads, config):
    new(config(num_streams=4), heads)
    with pytest.raises(ValueError, match=r"reducer.num_streams must be 4 \(.*pre_hc_head\) or null, got 2"):
        new(config(num_streams=2), heads)


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"reducer\.init must be inherit or random, got 'copy'"):
        HcGate(init="copy")
    with pytest.raises(ValueError, match=r"reducer\.path_norm must be true or false, got 'yes'"):
        HcGate(path_norm="yes")
    with pytest.raises(TypeError):
        Fc(bias=True)


def test_table1_counts():
    assert num_parameters(Fc()) == 67_108_864
    assert num_parameters(HcGate(path_norm=False)) == 65_541
    assert num_parameters(HcGate(path_norm=True)) == 65_541 + 16_384
    page = io.StringIO()
    Console(file=page, width=100).print(table1())
    assert {"67,108,864", "65,541", "16,384"} <= set(page.getvalue().split())
