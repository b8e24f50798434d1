"""The parts of a Qwen3-style draft layer: RMSNorm, rotary positions, SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
