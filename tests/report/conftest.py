"""Plausible samples: truncated geometric rounds with a rate per slot and method."""

from __future__ import annotations

import numpy as np
import pytest

from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.measure import Sample


def counts_from(rates, prompts: int, seed: int, rounds_low: int = 15, rounds_high: int = 40) -> PromptCounts:
    """Rounds whose slot k is accepted with rates[k - 1], a little better or worse per prompt."""
    generator = np.random.default_rng(seed)
    rounds = generator.integers(rounds_low, rounds_high, size=prompts)
    survived, reached = np.zeros((2, prompts, len(rates)), dtype=np.int64)
    for i in range(prompts):
        shift = generator.normal(0, 0.06)
        reach = rounds[i]
        for k, rate in enumerate(rates):
            reached[i, k] = reach
            reach = survived[i, k] = generator.binomial(reach, np.clip(rate + shift, 0.02, 0.98))
    accepted = survived.sum(axis=1)
    return PromptCounts(accepted + rounds, accepted, rounds, survived, reached)


RATES = {
    "HyperDFlash (6)": (0.66, 0.60, 0.57, 0.55, 0.53, 0.52),
    "Vanilla DFlash (6), pooled": (0.55, 0.50, 0.48, 0.46, 0.45, 0.44),
    "Vanilla DFlash (6), flat": (0.57, 0.53, 0.50, 0.49, 0.47, 0.46),
    "MTP (3)": (0.67, 0.43, 0.33),
    "MTP (6)": (0.67, 0.43, 0.33, 0.27, 0.23, 0.20),
    "MTP (6) fine-tuned": (0.69, 0.52, 0.45, 0.41, 0.38, 0.36),
}


@pytest.fixture
def make_results():
    def make(temperatures=(0.0, 1.0), per_domain=(40, 30, 20), rates=None, run_ids=True) -> list[Sample]:
        rates = rates or RATES
        prompts = sum(per_domain)
        domains = tuple(np.repeat(["math", "code", "chat"][: len(per_domain)], per_domain).tolist())
        looped = np.arange(prompts) % 17 == 0
        return [
            Sample(
                method=name,
                temperature=t,
                prompt_ids=tuple(f"p{i}" for i in range(prompts)),
                groups=domains,
                counts=counts_from([r * (0.93 if t else 1) for r in rate], prompts, 10 * j + int(t)),
                looped=looped,
                run=f"2026-02-0{j + 1}_stage2_{name.split()[0].lower()}_s0" if run_ids else "",
            )
            for t in temperatures
            for j, (name, rate) in enumerate(rates.items())
        ]

    return make
