"""The parts of a Qwen3-style draft layer: RMSNorm, rotary positions, SwiGLU, and DFlash 2's convolution around a sublayer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 16  # that share a dynamic kernel of the convolution, as in DFlash 2


def linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


class RMSNorm(nn.Module):
    """Normalizes the last dimension in fp32; ``shape`` may have leading dimensions, such as one scale per path."""

    def __init__(self, *shape: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """weight * u with u = x / sqrt(mean(x^2) + eps); saves x in its own dtype and one number per row for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight, scale = ctx.saved_tensors
        unit = x.float() * scale
        d_weight = (gradient * unit).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_unit = gradient * weight.float()
        d_x = d_unit.addcmul_(unit, (d_unit * unit).mean(dim=-1, keepdim=True).neg_()).mul_(scale)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


class SwiGLU(nn.Module):
    """[..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return _GatedDown.apply(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


class _GatedDown(torch.autograd.Function):
    """(silu(gate) * up) weight^T; saves only its arguments and recomputes silu(gate) * up, the widest tensor of a step."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.silu(gate).mul_(up) @ weight.to(gate.dtype).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        gate, up, weight = ctx.saved_tensors
        active = F.silu(gate)
        d_weight = (
            gradient.reshape(-1, gradient.shape[-1]).T @ (active * up).reshape(-1, up.shape[-1])
            if ctx.needs_input_grad[2]
            else None
        )
        d_product = gradient @ weight.to(gate.dtype)
        d_up = active.mul_(d_product)  # in place: these tensors are the widest of a step
        d_gate = d_product.mul_(up)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, d_up, None if d_weight is None else d_weight.to(weight.dtype)


class BlockConvolution(nn.Module):
    """Causal convolutions over the positions of a block around a sublayer (DFlash 2; z-lab/dflash, MIT).

        y[t] = sum_j (base[j] + d[t, j]) x[t - j],  j < ``taps``,    [d_in; d_out] = ``kernel_projection`` x

    before the sublayer with ``base_kernel[0]`` and d_in, after it with ``base_kernel[1]`` and d_out. It starts as identity."""

    def __init__(self, hidden_size: int, taps: int):
        super().__init__()
        if hidden_size % CHANNELS:
            raise ValueError(f"drafter.convolution needs a width in multiples of {CHANNELS}, got {hidden_size}: set it to 0")
        self.base_kernel = nn.Parameter(torch.empty(2, taps, hidden_size))
        self.kernel_projection = nn.Parameter(torch.empty(2 * taps * (hidden_size // CHANNELS), hidden_size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.kernel_projection.zero_()
        self.base_kernel.zero_()[:, 0] = 1.0

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., K, D] -> [..., K, D]."""
        d_in, d_out = F.linear(x, self.kernel_projection).unflatten(-1, (*self.base_kernel.shape[:2], -1)).unbind(-3)
        return _convolved(sublayer(_convolved(x, self.base_kernel[0], d_in)), self.base_kernel[1], d_out)


def _convolved(x: Tensor, base: Tensor, change: Tensor) -> Tensor:
    """x [..., K, D], base [taps, D], change [..., K, taps, D / CHANNELS] -> [..., K, D]."""
    kernels = base.to(x.dtype) + change.repeat_interleave(CHANNELS, dim=-1)  # [..., K, taps, D]
    shifted = [F.pad(x, (0, 0, tap, 0))[..., : x.shape[-2], :] for tap in range(len(base))]
    return (kernels * torch.stack(shifted, dim=-2)).sum(dim=-2)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns cos and [-sin, sin], [..., 1, E] in fp32, of positions [...]; the 1 is the head axis. There are no buffers."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = (positions[..., None].float() * theta**-exponents)[..., None, :]  # [..., 1, E / 2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotate-half RoPE to x [..., heads, E]: x cos + [second half, first half] [-sin, sin]."""
    return _Rotate.apply(x, cos.to(x.dtype), sin.to(x.dtype))


class _Rotate(torch.autograd.Function):
    """Computes its gradient as the inverse rotation."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)
