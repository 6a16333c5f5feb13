"""Numbers with their uncertainty: a mean, a difference or a rate, its 95 % interval and its noise floor.

The interval says where the truth lies, the noise floor which difference could be told from none at all: an effect below
the floor has not been seen. The unit of resampling is the document (or the question): tokens of one document are not
independent.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from tunewise.quality.measured import Measured

RESAMPLES = 2000
_NORMAL = 1.959964


def mean(sums: ArrayLike, counts: ArrayLike | None = None, *, seed: int = 0) -> Measured:
    """Return the mean of N pieces, sum(sums) / sum(counts), with a bootstrap over the pieces.

    Args:
        sums: (N,) values, or sums of the tokens' values in each document.
        counts: (N,) tokens of each document; None weighs every piece once.
        seed: of the resampling; equal seeds give equal intervals.
    """
    sums_N = np.asarray(sums, dtype=np.float64)
    counts_N = np.ones(len(sums_N)) if counts is None else np.asarray(counts, dtype=np.float64)
    return _estimate(sums_N, counts_N, seed)


def paired_difference(
    before: ArrayLike, after: ArrayLike, counts: ArrayLike | None = None, *, seed: int = 0
) -> Measured:
    """Return mean(after) - mean(before) over the same N pieces, resampled as pairs.

    With `counts` the values are sums over so many tokens, as in `mean`. Pairs cancel what is hard or easy about a
    document itself, so the interval is far narrower than that of two separate means (Koehn 2004, "Statistical
    significance tests for machine translation evaluation").

    Raises:
        ValueError: the two sides have not the same number of pieces.
    """
    before_N, after_N = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before_N.shape != after_N.shape:
        raise ValueError(f"{before_N.shape} values before and {after_N.shape} after cannot be paired")
    return mean(after_N - before_N, counts, seed=seed)


def rate(successes: int, num: int) -> Measured:
    """Return a share with Wilson's interval (Wilson 1927), which stays honest at 0, at 1 and for few trials.

    The noise floor is the half width of the interval of a rate of one half, the least certain one.
    """
    if num == 0:
        return Measured(middle=math.nan, low=0.0, high=1.0, noise_floor=1.0, num=0)
    low, high = wilson(successes, num)
    worst_low, worst_high = wilson(num / 2, num)
    share, floor = successes / num, (worst_high - worst_low) / 2
    return Measured(middle=share, low=min(low, share), high=max(high, share), noise_floor=floor, num=num)


def wilson(successes: float, num: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    share, square = successes / num, _NORMAL**2
    centre = (share + square / (2 * num)) / (1 + square / num)
    half = _NORMAL / (1 + square / num) * math.sqrt(share * (1 - share) / num + square / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _estimate(sums_N: NDArray[np.float64], counts_N: NDArray[np.float64], seed: int) -> Measured:
    num = len(sums_N)
    if num == 0 or counts_N.sum() == 0:
        return Measured(middle=math.nan, low=-math.inf, high=math.inf, noise_floor=math.inf, num=0)
    middle = float(sums_N.sum() / counts_N.sum())
    if num == 1 or not np.isfinite(sums_N).all():
        return Measured(middle=middle, low=-math.inf, high=math.inf, noise_floor=math.inf, num=num)
    generator = np.random.default_rng(seed)
    draws_BN = generator.multinomial(num, np.full(num, 1 / num), size=RESAMPLES).astype(np.float64)
    totals_B = draws_BN @ counts_N
    means_B = (draws_BN @ sums_N)[totals_B > 0] / totals_B[totals_B > 0]
    tail = _tail(num)
    low, high = np.quantile(means_B, [tail, 1 - tail])
    return Measured(
        middle=middle,
        low=float(min(low, middle)),
        high=float(max(high, middle)),
        noise_floor=_sign_flip_floor(sums_N, counts_N, generator),
        num=num,
    )


def _tail(num: int) -> float:
    """Return the quantile that gives a percentile bootstrap of `num` pieces the width of a t interval.

    Hesterberg 2015, "What teachers should know about the bootstrap", section 4: percentiles are too narrow for small
    samples by sqrt((n - 1) / n) and by normal instead of t quantiles.
    """
    return float(stats.norm.cdf(-math.sqrt(num / (num - 1)) * stats.t.ppf(0.975, num - 1)))


def _sign_flip_floor(
    sums_N: NDArray[np.float64], counts_N: NDArray[np.float64], generator: np.random.Generator
) -> float:
    """Return the 95 % quantile of |mean| if every piece's deviation had a random sign: what chance alone makes.

    Deviations are taken from the mean, so that a real effect does not raise its own floor.
    """
    deviations_N = sums_N - counts_N * (sums_N.sum() / counts_N.sum())
    signs_BN = generator.choice(np.array([-1.0, 1.0]), size=(RESAMPLES, len(sums_N)))
    return float(np.quantile(np.abs(signs_BN @ deviations_N) / counts_N.sum(), 0.95))
