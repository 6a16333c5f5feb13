"""The critical batch is found within a factor of two, with an interval that covers it and says when it cannot."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from tests.unit.lab.synthetic import SyntheticLab
from tunewise.lab.critical import LearningCurve, Observed, fit_learning_curve, wasted_tokens

BATCHES = (256, 512, 1024, 2048, 4096, 8192, 16384)
SEEDS = range(20)


def observed(
    critical: float, noise: float, seed: int, *, lengths: Sequence[int] = (100_000, 300_000), is_known: bool = False
) -> list[Observed]:
    """All batches at their best learning rates for each length, and every second one for three times the longest."""
    lab, chance = SyntheticLab(critical_batch=critical, start=9.0), random.Random(seed)
    arms = [(batch, length) for length in lengths for batch in BATCHES]
    arms += [(batch, 3 * max(lengths)) for batch in BATCHES[::2]]
    return [
        Observed(
            batch,
            length,
            lab.expected_loss(batch, lab.best_learning_rate(batch), None, length) + chance.gauss(0, noise),
            noise if is_known else None,
        )
        for batch, length in arms
    ]


def fitted(points: Sequence[Observed]) -> LearningCurve:
    curve = fit_learning_curve(points)
    assert curve is not None
    return curve


@pytest.mark.parametrize("critical", [1024.0, 4096.0, 16384.0])
@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_within_a_factor_of_two_and_covered(critical: float, noise: float) -> None:
    curves = [fitted(observed(critical, noise, seed, is_known=bool(seed % 2))) for seed in SEEDS]
    close = [critical / 2 <= curve.critical <= critical * 2 for curve in curves]
    covered = [(c.at_least or 0.0) <= critical <= (c.at_most or math.inf) for c in curves]
    assert sum(close) >= 0.9 * len(curves)
    assert sum(covered) >= 0.85 * len(curves)  # nominally 95 %
    for curve in curves:
        assert curve.critical_batch is not None
        assert curve.critical_batch.low <= curve.critical_batch.middle <= curve.critical_batch.high


def test_the_exact_curve_is_recovered() -> None:
    lab = SyntheticLab(critical_batch=3000.0, start=9.0)
    curve = fitted(observed(3000.0, 0.0, 0))
    assert curve.critical == pytest.approx(3000.0, rel=0.02)
    assert curve.exponent == pytest.approx(lab.exponent, abs=0.01)
    assert curve.floor == pytest.approx(lab.floor, abs=0.02)
    expected = lab.expected_loss(700, lab.best_learning_rate(700), None, 5_000_000)
    assert curve.loss(700, 5_000_000) == pytest.approx(expected, abs=0.005)


def test_batches_that_lose_nothing_bound_it_from_below_only() -> None:
    for seed in SEEDS[:5]:
        curve = fitted(observed(1e9, 0.005, seed))
        assert (curve.critical_batch, curve.at_most) == (None, None)
        assert curve.at_least is not None
        assert 16384 < curve.at_least < 1e9


def test_batches_that_all_waste_bound_it_from_above_only() -> None:
    for seed in SEEDS[:5]:
        curve = fitted(observed(4.0, 0.005, seed))
        assert (curve.critical_batch, curve.at_least) == (None, None)
        assert curve.at_most is not None
        assert 4 < curve.at_most < 512


def test_known_noise_that_is_too_small_is_not_believed() -> None:
    points = observed(4096.0, 0.02, 1)
    told = [Observed(p.batch, p.tokens, p.loss, 1e-5) for p in points]
    found, plain = fitted(told).critical_batch, fitted(points).critical_batch
    assert found is not None
    assert plain is not None
    assert found.high / found.low == pytest.approx(plain.high / plain.low, rel=0.3)


def test_too_few_points_say_nothing() -> None:
    points = observed(4096.0, 0.003, 0)
    assert fit_learning_curve(points[:4]) is None
    assert fit_learning_curve([p for p in points if p.tokens == 100_000]) is None
    assert fit_learning_curve([p for p in points if p.batch in (256, 1024)]) is None
    with pytest.raises(ValueError, match="deviation"):
        fit_learning_curve([*points, Observed(512, 100_000, 2.0, 0.1)])


def test_wasted_tokens() -> None:
    assert wasted_tokens(4096, 4096) == 2
    assert wasted_tokens(1, 1e9) == pytest.approx(1)
