"""Muon for a model whose expert weights are stacked in 3-D tensors, which torch.optim.Muon refuses.

Formula: Keller Jordan 2024, update scaled to AdamW's RMS as in Moonlight (arXiv 2502.16982, 0.2 * sqrt(max(rows, cols))),
so that one learning rate serves matrices here and everything else under AdamW. DeepSeek-V4 was trained with Muon too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix; [..., rows, cols] -> same shape."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix of the last two dimensions; Nesterov; decoupled weight decay."""

    def __init__(self, params, *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                by_shape.setdefault(tuple(p.shape[-2:]), []).append((p, update))
            for (rows, cols), pairs in by_shape.items():
                flat = torch.cat([u.reshape(-1, rows, cols) for _, u in pairs])
                flat = orthogonalise(flat) * (0.2 * max(rows, cols) ** 0.5)
                offset = 0
                for p, _ in pairs:
                    count = p.numel() // (rows * cols)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(flat[offset : offset + count].view_as(p), alpha=-group["lr"])
                    offset += count
