"""The line through measured micro-batches: seconds(rows) = t0 + t1 * rows, bytes(rows) = m0 + m1 * rows.

t0 is what a micro-batch costs however small it is (launches, reading the weights), m0 what is held without one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from tunewise.lab.findings import Throughput, ThroughputLine

OUTLIER_SHARE = 0.05
"""A point that lies closer to the others' line than this share of itself is none."""

OUTLIER_FACTOR = 4.0
"""An outlier lies so many times as far from the others' line as the farthest of them."""


def fit_line(points: Sequence[Throughput], update_seconds: float | None = None) -> ThroughputLine:
    """Return the line, by least squares of relative errors with no part below zero.

    With at least four points, one that lies far off the line of all others (a disturbed measurement) is left out.
    A single point gives a line through zero.

    Args:
        points: measured micro-batches of different sizes.
        update_seconds: what the optimizer's part of a step takes; it is passed on.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("no micro-batch was measured")
    t0, t1 = _line([(p.micro_batch_size, p.seconds.middle) for p in points])
    heavy = [(p.micro_batch_size, float(p.peak_tensor_bytes)) for p in points if p.peak_tensor_bytes]
    m0, m1 = _line(heavy) if heavy else (None, None)
    return ThroughputLine(
        t0_seconds=t0, t1_seconds_per_row=t1, m0_bytes=m0, m1_bytes_per_row=m1, update_seconds=update_seconds
    )


def predict_seconds(line: ThroughputLine, rows: float) -> float:
    """Return the seconds of forward and backward of a micro-batch."""
    return line.t0_seconds + line.t1_seconds_per_row * rows


def predict_bytes(line: ThroughputLine, rows: float) -> float | None:
    """Return the peak of tensor memory with a micro-batch of so many rows; None where it was not measured."""
    if line.m0_bytes is None or line.m1_bytes_per_row is None:
        return None
    return line.m0_bytes + line.m1_bytes_per_row * rows


def b95(points: Sequence[Throughput], share: float = 0.95) -> int:
    """Return the smallest measured micro-batch with at least `share` of the best tokens per second.

    Measured speeds and not the line's: on a CPU speed falls again when activations leave the cache.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("no micro-batch was measured")
    best = max(point.tokens_per_second.middle for point in points)
    return min(p.micro_batch_size for p in points if p.tokens_per_second.middle >= share * best)


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope, an outlier left out."""
    x, y = np.array(pairs, dtype=np.float64).T
    kept = np.ones(len(x), dtype=bool)
    outlier = _outlier(x, y)
    if outlier is not None:
        kept[outlier] = False
    return _least_squares(x[kept], y[kept])


def _outlier(x: NDArray[np.float64], y: NDArray[np.float64]) -> int | None:
    """The point that lies farthest off the line through all others, if it does so by far."""
    if len(x) < 4:
        return None
    found = None
    for index in range(len(x)):
        others = np.arange(len(x)) != index
        line = _least_squares(x[others], y[others])
        distance = np.abs((line[0] + line[1] * x) / y - 1)
        own, farthest = float(distance[index]), float(distance[others].max())
        is_far = own > max(OUTLIER_SHARE, OUTLIER_FACTOR * farthest)
        if is_far and (found is None or farthest < found[1]):
            found = index, farthest
    return None if found is None else found[0]


def _least_squares(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Intercept and slope with the least sum of squared relative errors, neither of them negative."""
    if len(x) == 1:
        return 0.0, float(y[0] / x[0])
    (intercept, slope), _ = nnls(np.column_stack([1 / y, x / y]), np.ones(len(x)))
    return float(intercept), float(slope)
