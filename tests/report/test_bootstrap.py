"""Pooled within a domain, plain mean over domains, prompts resampled within their domain, differences paired."""

from __future__ import annotations

import numpy as np
import pytest

from hyperdflash.report.bootstrap import MEAN, PromptCounts, interval, pooled_ratio, resample_prompts

DOMAINS = ("math", "math", "code", "code", "code")


def test_values_are_pooled_and_the_mean_is_plain():
    emitted, rounds = np.array([10, 2, 9, 3, 0]), np.array([2, 2, 3, 3, 0])
    ratio = pooled_ratio(emitted, rounds, resample_prompts(DOMAINS, 50))
    assert ratio.groups == ("math", "code", MEAN)
    # math 12 / 4 (a mean of prompts would be (5 + 1) / 2 too), code 12 / 6 (not (3 + 1) / 2 with a 0 / 0), mean of both
    assert ratio.value.tolist() == [3.0, 2.0, 2.5]
    skewed = pooled_ratio(np.array([9, 4, 1, 1, 1]), np.array([9, 1, 1, 1, 1]), resample_prompts(DOMAINS, 50))
    assert skewed.value[0] == 1.3  # (1 + 4) / 2 would be 2.5


def test_resamples_keep_each_domains_size_and_the_seed():
    first, again = resample_prompts(DOMAINS, 200, seed=3), resample_prompts(DOMAINS, 200, seed=3)
    assert {d: w.shape for d, w in first.weights.items()} == {"math": (200, 2), "code": (200, 3)}
    assert (first.weights["math"].sum(axis=1) == 2).all() and (first.weights["code"].sum(axis=1) == 3).all()
    assert all(np.array_equal(first.weights[d], again.weights[d]) for d in first.members)
    assert not np.array_equal(first.weights["code"], resample_prompts(DOMAINS, 200, seed=4).weights["code"])


def test_the_weights_are_a_resample_drawn_by_hand():
    resamples = resample_prompts(DOMAINS, 3, seed=0)
    emitted, rounds = np.array([10, 2, 9, 3, 4]), np.array([2, 2, 3, 3, 1])
    ratio = pooled_ratio(emitted, rounds, resamples)
    for r in range(3):
        drawn = np.repeat([2, 3, 4], resamples.weights["code"][r].astype(int))
        assert ratio.resampled[r, 1] == pytest.approx(emitted[drawn].sum() / rounds[drawn].sum())
        assert ratio.resampled[r, 2] == pytest.approx(ratio.resampled[r, :2].mean())


def test_identical_methods_differ_by_exactly_nothing():
    generator = np.random.default_rng(0)
    rounds = generator.integers(1, 30, 60)
    emitted = rounds + generator.integers(0, 60, 60)
    resamples = resample_prompts(["a", "b", "c"] * 20, 500)
    one, two = pooled_ratio(emitted, rounds, resamples), pooled_ratio(emitted.copy(), rounds.copy(), resamples)
    for estimate in one.minus(two).estimates().values():
        assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_pairing_narrows_the_interval():
    generator = np.random.default_rng(1)
    rounds = np.full(200, 20)
    ease = generator.integers(10, 60, 200)  # prompts differ much, methods little
    resamples = resample_prompts(["a"] * 200, 1000)
    one = pooled_ratio(rounds + ease, rounds, resamples)
    two = pooled_ratio(rounds + ease + generator.integers(0, 3, 200), rounds, resamples)
    paired = two.minus(one).estimates()["a"]
    single = one.estimates()["a"]
    assert paired.low > 0 and paired.high - paired.low < 0.1 * (single.high - single.low)


def test_quotient_is_taken_within_a_domain():
    """2 and 3 over 4 and 1: the mean is that of 0.5 and 3, not 2.5 over 2.5."""
    resamples = resample_prompts(["a", "b"], 20)
    one = np.ones(2)
    top, bottom = (pooled_ratio(np.array(values), one, resamples) for values in ([2.0, 3.0], [4.0, 1.0]))
    found = top.over(bottom).estimates()
    assert [found[name].value for name in ("a", "b", MEAN)] == [0.5, 3.0, 1.75]
    assert found[MEAN].low == found[MEAN].high == 1.75
    assert np.isnan(top.over(pooled_ratio(np.array([4.0, 0.0]), one, resamples)).estimates()[MEAN].value)


def test_coverage():
    """About 95% of 300 samples of prompts have the true ratio inside; three standard errors of slack."""
    generator = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        rounds = generator.integers(10, 40, 80)
        emitted = rounds + generator.binomial(rounds * 3, 0.5)  # true ratio 2.5 for every prompt
        estimate = pooled_ratio(emitted, rounds, resample_prompts(["a"] * 80, 200, trial)).estimates()["a"]
        hits += estimate.low <= 2.5 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.985


def test_undefined_is_nan_without_a_warning(recwarn):
    ratio = pooled_ratio(np.zeros((5, 2)), np.array([[1, 0]] * 5), resample_prompts(DOMAINS, 20))
    first, second = ratio.estimates()["math"]
    assert (first.value, first.low, first.high) == (0.0, 0.0, 0.0)
    assert np.isnan([second.value, second.low, second.high]).all()
    assert not recwarn.list


def test_interval_leaves_undefined_resamples_out():
    resampled = np.array([[1.0], [np.nan], [2.0], [3.0]])
    low, high = interval(resampled)
    assert low[0] == pytest.approx(1.05) and high[0] == pytest.approx(2.95)


def test_refuses():
    with pytest.raises(ValueError, match="no prompts"):
        resample_prompts([])
    with pytest.raises(ValueError, match="cannot be called 'mean'"):
        resample_prompts(["math", "mean"])
    one = np.zeros(3)
    with pytest.raises(ValueError, match=r"PromptCounts\.reached must be"):
        PromptCounts(one, one, one, np.zeros((3, 6)), np.zeros((3, 3)))
