"""The line through micro-batches finds t0, t1, m0 and m1, with one disturbed measurement or without."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from tunewise.lab.findings import Throughput
from tunewise.lab.outcome import Interval
from tunewise.lab.throughput import b95, fit_line, predict_bytes, predict_seconds

SIZES = (1, 2, 4, 8, 16, 32)


def measured(
    seconds: Callable[[int], float], sizes: Sequence[int] = SIZES, memory: Callable[[int], int] | None = None
) -> list[Throughput]:
    """Micro-batches of 100 tokens a row."""
    return [
        Throughput(
            micro_batch_size=size,
            tokens=100.0 * size,
            seconds=Interval(middle=(t := seconds(size)), low=t, high=t),
            tokens_per_second=Interval(middle=100 * size / t, low=100 * size / t, high=100 * size / t),
            peak_tensor_bytes=None if memory is None else memory(size),
        )
        for size in sizes
    ]


def test_an_exact_line_is_found() -> None:
    line = fit_line(measured(lambda size: 0.1295 + 0.00042 * size, memory=lambda size: 10**9 + 10**7 * size), 0.0255)
    assert (line.t0_seconds, line.t1_seconds_per_row) == pytest.approx((0.1295, 0.00042))  # methods.md, fact 6
    assert (line.m0_bytes, line.m1_bytes_per_row) == pytest.approx((1e9, 1e7))
    assert line.update_seconds == 0.0255
    assert predict_seconds(line, 64) == pytest.approx(0.1295 + 0.00042 * 64)
    assert predict_bytes(line, 64) == pytest.approx(1.64e9)


@pytest.mark.parametrize("outlier", SIZES)
@pytest.mark.parametrize("factor", [0.5, 1.5, 5.0])
def test_one_outlier_does_not_matter(outlier: int, factor: float) -> None:
    chance = random.Random(outlier)
    line = fit_line(
        measured(lambda size: (0.2 + 0.05 * size) * chance.gauss(1, 0.01) * (factor if size == outlier else 1))
    )
    assert predict_seconds(line, 4) == pytest.approx(0.4, rel=0.03)
    assert predict_seconds(line, 32) == pytest.approx(1.8, rel=0.03)


def test_noise_is_averaged_and_not_thrown_away() -> None:
    """With 3 % of noise the slope is known to the accuracy of all six points."""
    errors = []
    for seed in range(40):
        chance = random.Random(seed)
        line = fit_line(measured(lambda size, c=chance: (0.2 + 0.05 * size) * c.gauss(1, 0.03)))  # type: ignore[misc]
        errors.append(predict_seconds(line, 16) - 1.0)
    assert max(map(abs, errors)) < 0.06
    assert abs(sum(errors) / len(errors)) < 0.01


def test_nothing_is_negative() -> None:
    line = fit_line(measured(lambda size: 0.1 * size**1.3))
    assert line.t0_seconds == 0.0
    assert line.t1_seconds_per_row > 0
    assert (line.m0_bytes, predict_bytes(line, 3)) == (None, None)


def test_a_single_point_gives_a_line_through_zero() -> None:
    line = fit_line(measured(lambda _: 0.5, sizes=(4,)))
    assert (line.t0_seconds, line.t1_seconds_per_row) == (0.0, 0.125)
    with pytest.raises(ValueError, match="no micro-batch"):
        fit_line([])


def test_b95_is_the_smallest_that_is_nearly_as_fast() -> None:
    points = measured(lambda size: 0.2 + 0.05 * size)  # 1: 400/s, 8: 1333/s, 16: 1600/s, 32: 1778/s
    assert b95(points) == 32
    assert b95(points, share=0.85) == 16
    falling = measured(lambda size: 0.001 + 0.05 * size * (1.0 if size < 8 else 1.2))
    assert b95(falling) == 1
    with pytest.raises(ValueError, match="no micro-batch"):
        b95([])
