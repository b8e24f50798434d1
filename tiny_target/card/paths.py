"""Measures the hyper-connections: cosines of the paths, spread of the gates, and the gate's distance from a plain mean.

Shapes: see contracts.py; N tokens. If paths coincide or gates are constant, an inherited gate has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperdflash.targets.heads import TargetHeads


def head_gates(hc_head: nn.Module, residual: Tensor) -> Tensor:
    """Returns the path weights of ``hc_head``, [B, T, M, D] -> [B, T, M] fp32, in its own order of operations."""
    flat = hc_head.input_norm(residual.flatten(2).float())
    mixes = F.linear(flat, hc_head.hc_fn.float())
    return torch.sigmoid(mixes * hc_head.hc_scale.float() + hc_head.hc_base.float()) + hc_head.eps


def path_cosines(residual: Tensor) -> Tensor:
    """Returns the cosine of each pair of paths: [N, M, D] -> [N, M, M]."""
    unit = F.normalize(residual.float(), dim=-1)
    return unit @ unit.transpose(-1, -2)


def teacher_divergence(heads: TargetHeads, gated: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compares normed states [N, D] of the two teachers: KL(hc_head || mean_pool) and KL(mean_pool || hc_head) in nats, and
    whether their most likely tokens differ, each [N]."""
    p, q = heads.logits(gated).log_softmax(-1), heads.logits(pooled).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1), p.argmax(-1) != q.argmax(-1)


@torch.inference_mode()
def path_sums(heads: TargetHeads, residual: Tensor) -> dict[str, Tensor]:
    """Returns the sum of every measure, in fp64, over the tokens with residuals ``residual`` [N, M, D]."""
    gates = head_gates(heads.hc_head, residual[None])[0]
    gated, pooled = heads.collapse(residual[None], "hc_head")[0], heads.collapse(residual[None], "mean_pool")[0]
    forward, backward, differs = teacher_divergence(heads, gated, pooled)
    values = {
        "tokens": torch.ones(len(residual)),
        "cosines": path_cosines(residual),
        "norms": residual.float().norm(dim=-1),
        "gates": gates,
        "gate_squares": gates.double().square(),
        "distance": (pooled - gated).float().norm(dim=-1) / gated.float().norm(dim=-1),
        "kl_hc_head_mean_pool": forward,
        "kl_mean_pool_hc_head": backward,
        "argmax_differs": differs,
    }
    return {name: value.double().sum(dim=0) for name, value in values.items()}


def path_figures(parts: Sequence[dict[str, Tensor]]) -> dict:
    """Returns the numbers of the card, means over the tokens of all ``parts`` (`path_sums`); ValueError without tokens."""
    sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    if not sums["tokens"]:
        raise ValueError("the held-out answers have no tokens to measure the paths on: raise text_bytes")
    mean = {name: value / sums["tokens"] for name, value in sums.items()}
    apart = ~torch.eye(len(mean["cosines"]), dtype=torch.bool)
    return {
        "tokens": int(sums["tokens"]),
        "mean_cosine": float(mean["cosines"][apart].mean()),
        "cosines": mean["cosines"].tolist(),
        "path_norms": mean["norms"].tolist(),
        "gate_means": mean["gates"].tolist(),
        "gate_variances": (mean["gate_squares"] - mean["gates"].square()).clamp(min=0).tolist(),
        "relative_distance": float(mean["distance"]),
        "kl_hc_head_mean_pool_nats": float(mean["kl_hc_head_mean_pool"]),
        "kl_mean_pool_hc_head_nats": float(mean["kl_mean_pool_hc_head"]),
        "argmax_differs": float(mean["argmax_differs"]),
    }
