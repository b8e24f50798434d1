"""The two halves of the optimizer against torch's own AdamW and against the definition of Muon."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

import hyperdflash.optim.muon
from hyperdflash.optim.muon import MuonWithAdamW, orthogonalize


def quadratic_steps(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
    for step in range(count):
        parameter.grad = (parameter.detach() * (step + 1)).sin()
        optimizer.step()


def test_vectors_and_tables_follow_torch_adamw():
    for name, shape, decay in (("norm.weight", (6,), 0.0), ("embed_tokens.weight", (5, 6), 0.1)):
        ours, theirs = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for _ in range(2))
        quadratic_steps(ours, MuonWithAdamW([(name, ours)], lr=0.01, weight_decay=0.1), 7)
        reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=decay)
        quadratic_steps(theirs, reference, 7)
        torch.testing.assert_close(ours, theirs)


def test_updates_are_nearly_orthogonal():
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    for matrix in orthogonalize(x):
        singular = torch.linalg.svdvals(matrix)
        assert singular.min() > 0.5 and singular.max() < 1.3
    torch.testing.assert_close(orthogonalize(x.mT), orthogonalize(x).mT)


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """As the formula reads, in fp64, one wide matrix at a time."""
    x = x.double() / (x.double().norm() + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


@pytest.mark.parametrize(
    ("dtype", "in_bf16", "error"),
    [("float64", True, (0, 1e-12)), ("float32", False, (0, 1e-4)), ("float32", True, (1e-3, 3e-2))],
)
def test_the_iteration_is_the_formula_and_only_fp32_is_iterated_in_bf16(dtype, in_bf16, error, monkeypatch):
    monkeypatch.setattr(hyperdflash.optim.muon, "multiplies_bf16", lambda device: in_bf16)
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    found = orthogonalize(x)
    wanted = torch.stack([newton_schulz(matrix) for matrix in x])
    assert found.dtype == x.dtype
    assert error[0] <= float((found.double() - wanted).norm() / wanted.norm()) <= error[1]


def test_a_matrix_moves_by_the_learning_rate_times_adamws_rms():
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    MuonWithAdamW([("layers.0.q.weight", weight)], lr=0.1).step()
    rms = (weight.detach() - before).square().mean().sqrt()
    assert 0.1 * 0.2 * 0.6 < rms < 0.1 * 0.2 * 1.2


def test_stacked_experts_move_like_separate_matrices():
    generator = torch.Generator().manual_seed(0)
    stacked = nn.Parameter(torch.randn(3, 8, 12, generator=generator))
    apart = [nn.Parameter(m.clone()) for m in stacked.detach()]
    together = MuonWithAdamW([("experts.down_proj", stacked)], lr=0.1)
    separately = MuonWithAdamW([(f"layers.{i}.w", p) for i, p in enumerate(apart)], lr=0.1)
    for _ in range(3):
        stacked.grad = torch.randn(3, 8, 12, generator=generator)
        for p, gradient in zip(apart, stacked.grad, strict=True):
            p.grad = gradient.clone()
        together.step(), separately.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in apart]))


def test_a_step_is_a_number_on_the_host():
    """Also one that an older state holds as a tensor: a tensor may lie on a device, which reading it would wait for."""
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    whole, resumed = (MuonWithAdamW([("norm.weight", p)], lr=0.05) for p in weights)
    quadratic_steps(weights[0], whole, 3)
    weights[1].data.copy_(weights[0].data)
    state = deepcopy(whole.state_dict())
    assert type(state["state"][0]["step"]) is int
    state["state"][0]["step"] = torch.tensor(3.0)
    resumed.load_state_dict(state)
    assert type(resumed.state[weights[1]]["step"]) is int
    for p, optimizer in zip(weights, (whole, resumed), strict=True):
        quadratic_steps(p, optimizer, 2)
    assert torch.equal(*weights)


def test_its_state_survives_a_checkpoint():
    def made() -> tuple[list, MuonWithAdamW]:
        generator = torch.Generator().manual_seed(0)
        pair = [("layers.w", nn.Parameter(torch.randn(4, 6, generator=generator)))]
        pair += [("norm.weight", nn.Parameter(torch.randn(4, generator=generator)))]
        return pair, MuonWithAdamW(pair, lr=0.05)

    (pair, whole), (other, resumed) = made(), made()
    for name, p in pair:
        if name == "layers.w":
            quadratic_steps(p, whole, 3)
    for (_, p), (_, q) in zip(pair, other, strict=True):
        q.data.copy_(p.data)
    resumed.load_state_dict(deepcopy(whole.state_dict()))
    for (_, p), (_, q) in zip(pair, other, strict=True):
        for parameter, optimizer in ((p, whole), (q, resumed)):
            quadratic_steps(parameter, optimizer, 2)
        assert torch.equal(p, q)
