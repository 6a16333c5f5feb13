"""Time several things in turns, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from tunewise.reproduce.claim import Finding


def clock() -> float:
    """Return seconds since some moment: of this process's own work where one thread computes, else of the wall.

    With one thread both are the same on a machine that is ours alone, and only the first is on one that is shared.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turns(things: Mapping[str, Callable[[], object]], turns: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return the seconds of every call; each turn calls every thing once, the first `warm_up` turns do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(warm_up + turns):
        for name, thing in things.items():
            started = clock()
            thing()
            if turn >= warm_up:
                seconds[name].append(clock() - started)
    return seconds


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> Finding:
    """Return the median of one / other, turn by turn, with the interval of a sign test (at least 95 % sure).

    The interval goes from the k-th smallest to the k-th largest ratio, with k from the binomial distribution; of fewer
    than six turns no such interval is 95 % sure, and the finding has none.
    """
    found = sorted(one / other for one, other in zip(ones, others, strict=True))
    rank = sign_test_rank(len(found))
    if rank is None:
        return Finding(middle=statistics.median(found))
    return Finding(middle=statistics.median(found), low=found[rank], high=found[-1 - rank])


def sign_test_rank(count: int) -> int | None:
    """Return the largest k with P(fewer than k + 1 of `count` fair coins show heads) <= 2.5 %, or None."""
    probability, term, rank = 0.0, 0.5**count, None
    for k in range(count + 1):
        probability += term
        if probability > 0.025:
            return rank
        rank = k
        term = term * (count - k) / (k + 1)
    return rank
