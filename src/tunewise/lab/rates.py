"""The best learning rate lies between those that were tried."""

from __future__ import annotations

import math
from collections.abc import Mapping


def lowest_rate(losses: Mapping[float, float]) -> tuple[float, float]:
    """Return the rate of the lowest loss and that loss, from the parabola through the lowest point and its neighbours.

    Losses over the logarithm of the rate are close to a parabola around their minimum. Where the lowest point lies at
    the edge, or a neighbour has no finite loss, the point itself is the answer.

    Args:
        losses: loss by learning rate; at least one, all rates above zero.
    """
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda number: losses[rates[number]])
    best = rates[place]
    if place in (0, len(rates) - 1):
        return best, losses[best]
    (left, low), (middle, lowest), (right, high) = (
        (math.log(rate), losses[rate]) for rate in rates[place - 1 : place + 2]
    )
    if not (math.isfinite(low) and math.isfinite(high)) or low == lowest == high:
        return best, losses[best]
    # Slopes of the chords on either side; their change over half the width is the second derivative.
    falling, rising = (lowest - low) / (middle - left), (high - lowest) / (right - middle)
    curvature = (rising - falling) / ((right - left) / 2)
    at = (left + middle) / 2 - falling / curvature
    slope_at_middle = falling + curvature * (middle - left) / 2
    return math.exp(at), lowest - slope_at_middle**2 / (2 * curvature)
