"""The acceptance rules, and replay's rule against true speculative sampling by simulation."""

from __future__ import annotations

import pytest
import torch

from hyperdflash.decoding.acceptance import sampled_accept
from hyperdflash.targets.sampling import probabilities, token_probabilities


def test_sampled_accept_at_its_borders():
    q = torch.tensor([0.5, 0.2, 0.0, 0.3, 0.0, 0.3])
    p = torch.tensor([0.5, 0.4, 0.7, 0.1, 0.0, 0.0])
    almost_one, half = 1 - 2**-24, 0.5
    # equal and greater q always accept; q = 0 never; p = 0 < q accepts; q / p = 1/2 accepts below a half
    assert sampled_accept(q, p, torch.full((6,), almost_one)).tolist() == [True, False, False, True, False, True]
    assert sampled_accept(q, p, torch.full((6,), half)).tolist() == [True, False, False, True, False, True]
    assert sampled_accept(q, p, torch.full((6,), 0.49)).tolist() == [True, True, False, True, False, True]
    assert sampled_accept(q, p, torch.zeros(6)).tolist() == [True, True, False, True, False, True]


def simulate_loop(p, q, n, generator):
    """True speculative sampling of one token: y ~ q, accepted with min(1, p/q), else the residual: (emitted, accepted)."""
    y = torch.multinomial(q, n, replacement=True, generator=generator)
    accepted = torch.rand(n, generator=generator) < p[y] / q[y]
    residual = torch.multinomial((p - q).clamp(min=0), n, replacement=True, generator=generator)
    return torch.where(accepted, y, residual), accepted


def simulate_replay(p, q, n, generator, rule):
    """x ~ p, then the rule under test."""
    x = torch.multinomial(p, n, replacement=True, generator=generator)
    return x, rule(q[x], p[x], torch.rand(n, generator=generator))


def joint(tokens, accepted, vocab):
    """Share of draws by (token, accepted): [V, 2]."""
    counts = torch.bincount(tokens * 2 + accepted.long(), minlength=2 * vocab).double().view(vocab, 2)
    return counts / counts.sum()


def disagreement(rule) -> tuple[float, float]:
    """Largest difference of the joint distribution from the loop's, and of the acceptance rate from sum min(p, q)."""
    generator = torch.Generator().manual_seed(3)
    vocab, n = 7, 200_000
    p = torch.softmax(2 * torch.randn(vocab, generator=generator), -1)
    q = torch.softmax(2 * torch.randn(vocab, generator=generator), -1)
    loop = joint(*simulate_loop(p, q, n, generator), vocab)
    x, accepted = simulate_replay(p, q, n, generator, rule)
    rate = torch.minimum(p, q).sum()
    return float((joint(x, accepted, vocab) - loop).abs().max()), float((accepted.double().mean() - rate).abs())


def test_replay_has_the_joint_law_of_speculative_sampling():
    law, rate = disagreement(sampled_accept)
    assert law < 0.005 and rate < 0.005


def test_the_swapped_rule_fails_the_same_check():
    law, rate = disagreement(lambda q, p, u: sampled_accept(p, q, u))
    assert law > 0.02 and rate > 0.02


def test_the_nucleus_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert torch.allclose(probabilities(logits, 1.0), torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    # 0.5 < 0.7 <= 0.8: two tokens stay
    assert torch.allclose(probabilities(logits, 1.0, 0.7), torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    assert probabilities(logits, 1.0, 0.01).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    squared = torch.tensor([[0.25, 0.09, 0.0225, 0.0025]])
    assert torch.allclose(probabilities(logits, 0.5), squared / squared.sum())
    assert torch.allclose(token_probabilities(logits, torch.tensor([1]), 1.0, 0.7), torch.tensor([0.375]))


def test_the_nucleus_is_that_of_transformers():
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    warped = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(0.7)(None, logits))
    assert torch.allclose(probabilities(logits, 0.7, 0.8), warped.softmax(-1), atol=1e-6)


@pytest.mark.parametrize(("temperature", "top_p", "message"), [(-1.0, 1.0, "temperature"), (1.0, 0.0, "top_p")])
def test_wrong_sampling_settings_are_refused(temperature, top_p, message):
    with pytest.raises(ValueError, match=message):
        probabilities(torch.zeros(1, 3), temperature, top_p)
