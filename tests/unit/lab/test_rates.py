"""The best rate between those that were tried."""

from __future__ import annotations

import math

import pytest

from tunewise.lab.rates import lowest_rate


@pytest.mark.parametrize("best", [2e-3, 3e-3, 4.5e-3])
def test_a_parabola_over_the_logarithm_is_found_exactly_from_uneven_rates(best: float) -> None:
    losses = {rate: 1.5 + 0.3 * math.log(rate / best) ** 2 for rate in (1e-3, 3e-3, 5e-3, 2e-2)}
    assert lowest_rate(losses) == pytest.approx((best, 1.5))


def test_a_neighbour_that_begins_to_diverge_lowers_the_rate() -> None:
    rate, loss = lowest_rate({0.0035: 3.286, 0.007: 3.2585, 0.014: 3.947})
    assert 0.0048 < rate < 0.0054
    assert loss < 3.2585


def test_the_edge_a_failed_neighbour_and_level_losses_stay_where_they_are() -> None:
    assert lowest_rate({1e-3: 1.0, 2e-3: 2.0}) == (1e-3, 1.0)
    assert lowest_rate({1e-3: 2.0, 2e-3: 1.0, 4e-3: math.inf}) == (2e-3, 1.0)
    assert lowest_rate({1e-3: 1.0, 2e-3: 1.0, 4e-3: 1.0})[1] == 1.0
