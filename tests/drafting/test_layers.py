import pytest
import torch
import torch.nn.functional as F

from hyperdflash.drafting.layers import BlockConvolution, RMSNorm, SwiGLU


@pytest.mark.parametrize("shape", [(8,), (4, 8)], ids=["one scale", "one a path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients(shape, dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(5, 3, 4, 8)).to(dtype).requires_grad_()
    norm = RMSNorm(*shape, eps=1e-3).to(dtype)
    norm.weight.data.normal_()
    towards = torch.randn(5, 3, 4, 8)
    exact = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = F.rms_norm(exact[0], (8,), None, 1e-3) * exact[1]
    wanted = torch.autograd.grad((expected * towards).sum(), exact)
    output = norm(x)
    got = torch.autograd.grad((output * towards).sum(), (x, norm.weight))
    rough = dtype == torch.bfloat16
    for ours, truth in zip((output, *got), (expected, *wanted), strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape
        torch.testing.assert_close(ours.double(), truth, rtol=0.02 if rough else 1e-5, atol=0.1 if rough else 1e-5)


def test_rms_norm_of_frozen_input_trains_its_weight():
    norm = RMSNorm(8, eps=1e-6)
    norm.weight.data.fill_(1.0)
    x = torch.randn(3, 8)
    norm(x).sum().backward()
    torch.testing.assert_close(norm.weight.grad, F.rms_norm(x, (8,), None, 1e-6).sum(dim=0))


def test_swiglu_and_its_gradients():
    torch.manual_seed(0)
    mlp = SwiGLU(6, 10)
    x = torch.randn(4, 6, requires_grad=True)
    inputs = x, *mlp.parameters()
    expected = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)
    towards = torch.randn(4, 6)
    got, wanted = (torch.autograd.grad((y * towards).sum(), inputs) for y in (mlp(x), expected))
    for ours, formula in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, formula)


def test_a_convolution_is_its_formula_within_each_block():
    """Channel by channel, y[t] = sum_j (base[j] + d[t, j, group]) x[t - j], around a sublayer that doubles."""
    draw, convolution = torch.Generator().manual_seed(0), BlockConvolution(32, 2)
    for parameter in convolution.parameters():
        parameter.data.normal_(0.0, 0.5, generator=draw)
    x = torch.randn(2, 3, 5, 32, generator=draw)
    changes = F.linear(x, convolution.kernel_projection).view(2, 3, 5, 2, 2, 2)  # before and behind, taps, groups

    def convolved(values, side):
        found = torch.zeros_like(values)
        for t, tap, channel in [(i, j, c) for i in range(5) for j in range(min(i, 1) + 1) for c in range(32)]:
            kernel = convolution.base_kernel[side, tap, channel] + changes[:, :, t, side, tap, channel // 16]
            found[:, :, t, channel] += kernel * values[:, :, t - tap, channel]
        return found

    with torch.no_grad():
        torch.testing.assert_close(convolution(x, lambda y: 2 * y), convolved(2 * convolved(x, 0), 1))
        convolution.reset_parameters()
        assert torch.equal(convolution(x, lambda y: 2 * y), 2 * x)
