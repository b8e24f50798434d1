"""Codecs: what comes back, how exact it is, what it costs."""

from __future__ import annotations

import pytest
import torch

from hyperdflash.states.codecs import CODECS, e4m3_to_bf16


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    """fp32, with a few values per row a hundred times the others, as residuals have them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.01, 100 * values, values)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_twice_equals_rounding_once(name, dtype):
    codec = CODECS[name]
    once = codec.decode(codec.encode(states(50, 4, 64).to(dtype)))
    assert once.dtype == codec.dtype == (torch.float32 if name == "fp32" else torch.bfloat16)
    assert torch.equal(codec.decode(codec.encode(once)), once)


@pytest.mark.parametrize(("name", "bound"), [("fp32", 0.0), ("bf16", 2**-8), ("fp8", 2**-4)])
def test_the_relative_error_is_within_half_a_step(name, bound):
    exact = states(200, 4, 64)
    codec = CODECS[name]
    error = (codec.decode(codec.encode(exact)).float() - exact).abs()
    small = exact.abs().amax(-1, keepdim=True) * 2.0**-13  # below this a value may lie among e4m3's subnormal numbers
    assert (error <= bound * torch.maximum(exact.abs(), small)).all()
    assert name == "fp32" or error.max() > 0


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("paths", "width"), [(4, 64), (4, 4096), (1, 3)])
def test_bytes_per_token(name, paths, width):
    codec = CODECS[name]
    tensors = codec.encode(states(3, paths, width))
    assert sum(tensor.nbytes for tensor in tensors.values()) == 3 * codec.bytes_per_token(paths, width)
    assert all(len(tensor) == 3 for tensor in tensors.values())
    assert CODECS["fp8"].bytes_per_token(4, 4096) == 16 * 1024 + 16


def test_rows_decode_alone():
    codec = CODECS["fp8"]
    tensors = codec.encode(states(20, 4, 64))
    part = codec.decode({name: tensor[5:9] for name, tensor in tensors.items()})
    assert torch.equal(part, codec.decode(tensors)[5:9])


def test_every_finite_e4m3_number_becomes_bfloat16():
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    finite = every[every.float().isfinite()]
    assert len(finite) == 254
    assert torch.equal(e4m3_to_bf16(finite).view(torch.int16), finite.to(torch.bfloat16).view(torch.int16))  # -0.0 too


def test_fp8_decodes_without_a_second_rounding():
    tensors = CODECS["fp8"].encode(states(50, 4, 64))
    mantissa, _ = torch.frexp(tensors["scale"])
    assert (mantissa == 0.5).all(), "scales are powers of two"
    exact = tensors["states"].double() * tensors["scale"].double()[..., None]
    assert torch.equal(CODECS["fp8"].decode(tensors).double(), exact)


def test_fp8_uses_the_whole_range_of_every_path_of_every_token():
    exact = states(50, 4, 64) * torch.logspace(-6, 6, 200).view(50, 4, 1)
    stored = CODECS["fp8"].encode(exact)["states"].float().abs().amax(-1)
    assert (stored > 223).all() and (stored <= 448).all()


def test_fp8_of_edge_values():
    codec = CODECS["fp8"]
    rows = torch.tensor([[0.0, 0.0], [448.0, -448.0], [224.0, 1.0], [3e38, 1.0], [1e-44, 0.0], [447.0, 0.01]]).view(6, 1, 2)
    decoded = codec.decode(codec.encode(rows)).float()
    assert torch.isfinite(decoded).all()
    assert decoded[0].abs().sum() == 0
    assert decoded[1].flatten().tolist() == [448.0, -448.0] and decoded[2].flatten().tolist() == [224.0, 1.0]
    assert decoded[3, 0, 0] == pytest.approx(3e38, rel=2**-4)
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"inf or NaN.*cache\.dtype"):
            codec.encode(torch.tensor([[[1.0, value]]]))
