"""Intervals cover, floors mean what they say, pairs are paired."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunewise.quality.statistics import mean, paired_difference, rate, wilson


def test_a_mean_is_weighted_by_tokens() -> None:
    found = mean([2.0, 30.0], [1, 10])
    assert found.middle == pytest.approx(32 / 11)
    assert found.num == 2


@pytest.mark.parametrize("num", [8, 40])
def test_the_interval_of_a_mean_covers_the_truth(num: int) -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        found = mean(generator.normal(1.0, 2.0, size=num))
        covered += found.low <= 1.0 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_interval_of_a_token_mean_covers_the_truth() -> None:
    generator = np.random.default_rng(6)
    covered = 0
    for _ in range(200):
        counts = generator.integers(5, 50, size=30)
        covered += (found := mean(counts * generator.normal(0.5, 1.0, size=30), counts)).low <= 0.5 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_without_effect_the_noise_floor_is_passed_in_one_case_of_twenty() -> None:
    generator = np.random.default_rng(7)
    passed = sum(abs((found := mean(generator.normal(size=40))).middle) > found.noise_floor for _ in range(300))
    assert 0.02 <= passed / 300 <= 0.09


def test_a_real_effect_does_not_raise_its_own_floor() -> None:
    noise = np.random.default_rng(8).normal(size=50)
    assert mean(noise + 100.0).noise_floor == pytest.approx(mean(noise).noise_floor)


def test_pairs_see_what_two_means_cannot() -> None:
    generator = np.random.default_rng(9)
    before = generator.normal(4.0, 2.0, size=30)
    after = before - 0.1 + generator.normal(0.0, 0.02, size=30)
    paired = paired_difference(before, after)
    assert paired.is_below_zero
    assert not paired.is_above_zero
    shuffled = paired_difference(before, after[::-1])
    assert shuffled.low < 0.0 < shuffled.high


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([1.0, 2.0], [1.0])


def test_one_piece_has_no_bounds_and_none_no_value() -> None:
    one, none = mean([3.0]), mean([])
    assert (one.low, one.middle, one.high) == (-math.inf, 3.0, math.inf)
    assert math.isnan(none.middle)
    assert not none.is_above_zero


def test_a_value_that_is_not_finite_bounds_nothing() -> None:
    found = mean([1.0, math.nan, 2.0])
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_equal_calls_give_equal_intervals() -> None:
    values = np.random.default_rng(1).normal(size=25)
    assert mean(values) == mean(values)
    assert mean(values, seed=1) != mean(values)


def test_wilson_agrees_with_the_published_example() -> None:
    """Newcombe 1998, table I: 15 of 148 gives 0.0624 to 0.1605."""
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_a_rate_is_honest_at_its_ends() -> None:
    none, every = rate(0, 10), rate(10, 10)
    assert none.low == 0.0
    assert 0.2 < none.high < 0.35
    assert every.high == pytest.approx(1.0)
    assert 0.65 < every.low < 0.8
    assert rate(0, 0).num == 0
