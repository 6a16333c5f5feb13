"""Timing in turns, and the interval of a median ratio."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tunewise.reproduce.timing import in_turns, median_ratio, sign_test_rank


def test_things_are_called_in_turns_and_warm_up_does_not_count() -> None:
    called: list[str] = []
    seconds = in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, turns=2, warm_up=1)
    assert called == ["a", "b"] * 3
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("count", [1, 5, 6, 8, 9, 20, 80])
def test_the_interval_is_at_least_95_percent_sure(count: int) -> None:
    rank = sign_test_rank(count)
    if rank is None:
        assert 2 * stats.binom.cdf(0, count, 0.5) > 0.05
    else:
        assert 2 * stats.binom.cdf(rank, count, 0.5) <= 0.05 < 2 * stats.binom.cdf(rank + 1, count, 0.5)


def test_the_interval_covers_a_known_ratio() -> None:
    draws = np.random.default_rng(0).lognormal(np.log(1.3), 0.2, size=(400, 20))
    found = [median_ratio(list(each), [1.0] * 20) for each in draws]
    covered = sum(each.low <= 1.3 <= each.high for each in found if each.low is not None and each.high is not None)
    assert 0.92 <= covered / 400 <= 1.0
    assert median_ratio([2.0, 3.0], [1.0, 1.0]).low is None
