"""The noise scale is a ratio of means, with an interval that says when nothing can be said."""

from __future__ import annotations

import numpy as np
import pytest

from tunewise.engine.noise_sums import NoiseSums
from tunewise.lab.findings import NoiseScale
from tunewise.lab.noise_scale import noise_scale


def drawn(norm: float, norm_noise: float, variance: float, count: int, seed: int) -> list[NoiseSums]:
    chance = np.random.default_rng(seed)
    return [
        NoiseSums(squared_norm=norm + norm_noise * float(z), variance=variance * float(v))
        for z, v in zip(chance.standard_normal(count), chance.gamma(8, 1 / 8, count), strict=True)
    ]


def scale(sums: list[NoiseSums]) -> NoiseScale:
    return noise_scale("per example", sums)


def test_interval_covers() -> None:
    hits = 0
    for seed in range(100):
        found = scale(drawn(1.0, 0.4, 500.0, 8, seed))
        hits += found.low <= 500 <= (found.high or float("inf"))
    assert hits >= 90


def test_is_the_ratio_of_the_means() -> None:
    found = scale([NoiseSums(squared_norm=n, variance=v) for n, v in [(1, 100), (3, 300), (2, 160), (2, 240)]])
    assert found.tokens == pytest.approx(100)
    assert (found.estimator, found.num_batches) == ("per example", 4)


def test_a_gradient_that_drowns_gives_a_lower_bound() -> None:
    bounds = [scale(drawn(0.01, 0.4, 500.0, 16, seed)) for seed in range(20)]
    drowned = [each for each in bounds if each.tokens is None]
    assert len(drowned) >= 17
    assert all(each.high is None and 200 < each.low < 500 / 0.01 for each in drowned)


def test_a_mean_below_zero_gives_a_lower_bound() -> None:
    found = scale([NoiseSums(squared_norm=n, variance=100.0) for n in (-1.0, -2.0, -1.5, 0.5)])
    assert (found.tokens, found.high) == (None, None)
    assert found.low >= 100 / 0.5


def test_no_noise_to_be_seen_is_zero() -> None:
    found = scale([NoiseSums(squared_norm=2.0, variance=v) for v in (-1.0, -2.0, -1.5, 0.5)])
    assert (found.tokens, found.low) == (0.0, 0.0)


def test_same_seed_same_interval() -> None:
    sums = drawn(1.0, 0.4, 500.0, 8, 0)
    assert noise_scale("two batches", sums) == noise_scale("two batches", sums)
    assert noise_scale("two batches", sums) != noise_scale("two batches", sums, seed=1)


def test_three_batches_say_nothing() -> None:
    found = scale(drawn(1.0, 0.1, 5.0, 3, 0))
    assert (found.tokens, found.low, found.high, found.num_batches) == (None, 0.0, None, 3)
