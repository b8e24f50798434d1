"""Muon for models that stack expert weights in 3-D tensors, which torch.optim.Muon refuses. The formula is Keller Jordan's
(2024). Updates are scaled to AdamW's RMS as in Moonlight (arXiv 2502.16982, 0.2 * sqrt(max(rows, cols))), so that Muon and
AdamW share one learning rate. DeepSeek-V4 was trained with Muon too."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Approximates the nearest semi-orthogonal matrices by Newton-Schulz iteration: [n, rows, cols] -> same shape and dtype.
    fp32 input is iterated in bf16, as in the original, if the device has bf16 instructions; other dtypes in their own."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.dtype == torch.float32 and multiplies_bf16(x.device.type):
        x = x.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(update.dtype)


def multiplies_bf16(device: str) -> bool:
    """Tells whether the device type has instructions for bf16 products, which are faster than fp32 there. All ranks must have
    the same answer, since otherwise their weights drift apart."""
    if device == "cpu":
        features = torch.cpu.get_capabilities()
        return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (momentum, Nesterov, one orthogonal update per matrix of the last two dimensions) for matrices inside layers, AdamW
    for everything else: embeddings, heads, norms, biases, gates, hyper-connections.

    Decoupled weight decay applies to matrices and tables alone. ``tables`` are embedding-like parameters beside those that
    ``TABLES`` knows by name. One optimizer holds both kinds of groups, so that one schedule and one state serve both.
    """

    TABLES = ("embed", "lm_head")  # tables of the vocabulary: AdamW, with decay
    SCALARS = ("hc", "gate.weight", "position_bias", "indexer", "path_norm", "base_kernel", "mixing")  # AdamW, without decay

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        lr: float,
        tables: Collection[Tensor] = (),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ):
        matrices, table_parameters, vectors = [], [], []
        given = {id(table) for table in tables}
        for name, p in named_parameters:
            if id(p) in given:
                table_parameters.append(p)
            elif p.ndim < 2 or any(part in name for part in self.SCALARS):
                vectors.append(p)
            else:
                (table_parameters if any(part in name for part in self.TABLES) else matrices).append(p)
        groups = [
            {"params": matrices, "muon": True, "weight_decay": weight_decay},
            {"params": table_parameters, "muon": False, "weight_decay": weight_decay},
            {"params": vectors, "muon": False, "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    def load_state_dict(self, state_dict: dict) -> None:
        """Converts step counts, which a saved state may hold as tensors, to Python numbers: no step waits for a device."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "step" in state:
                state["step"] = int(state["step"])

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon if group["muon"] else self._adamw)(group)
        return loss

    def _muon(self, group: dict) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            buffer = self.state[p]["momentum"]
            buffer.lerp_(p.grad, 1 - group["momentum"])
            by_shape.setdefault(tuple(p.shape[-2:]), []).append((p, p.grad.lerp(buffer, group["momentum"])))
        for (rows, cols), pairs in by_shape.items():
            flat = torch.cat([update.reshape(-1, rows, cols) for _, update in pairs])
            flat = orthogonalize(flat) * (0.2 * max(rows, cols) ** 0.5)
            for (p, _), update in zip(pairs, flat.split([p.numel() // (rows * cols) for p, _ in pairs]), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"])

    def _adamw(self, group: dict) -> None:
        (b1, b2), eps = group["betas"], group["eps"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            step = state["step"]
            state["mean"].lerp_(p.grad, 1 - b1)
            state["square"].lerp_(p.grad.square(), 1 - b2)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            scale = (state["square"] / (1 - b2**step)).sqrt_().add_(eps)
            p.addcdiv_(state["mean"] / (1 - b1**step), scale, value=-group["lr"])
