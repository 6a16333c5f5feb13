"""What a model can do, item by item, before and after: scores that can be compared as pairs.

A suite gives for each of its metrics one value an item (a document, a question), not a mean: two states of a model are
compared item by item, with a paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunewise.quality.losses import DocumentLosses
from tunewise.quality.measured import Measured
from tunewise.quality.statistics import mean, paired_difference, rate
from tunewise.recipe import Value


@dataclass(frozen=True, eq=False)
class Items:
    """One metric's values.

    Attributes:
        values: float64 (N,), one an item; with `counts` a sum over so many tokens.
        counts: int64 (N,), or None: each item counts once.
        is_better: 1 where more is better, -1 where less is, 0 where neither is.
    """

    values: NDArray[np.float64]
    counts: NDArray[np.int64] | None = None
    is_better: int = 1

    @staticmethod
    def of(values: Sequence[float] | Sequence[bool], is_better: int = 1) -> Items:
        """Return items of plain values."""
        return Items(np.asarray(values, dtype=np.float64), None, is_better)

    @staticmethod
    def of_losses(losses: DocumentLosses) -> Items:
        """Return losses as items, nats per token."""
        return Items(losses.sums, losses.counts, -1)

    def measured(self) -> Measured:
        """Return the mean with its interval: Wilson's where every value is 0 or 1."""
        if self.counts is None and len(self.values) > 0 and np.isin(self.values, (0.0, 1.0)).all():
            return rate(int(self.values.sum()), len(self.values))
        return mean(self.values, self.counts)


class Comparison(Value):
    """One metric.

    Attributes:
        after: of the model that was asked about.
        before: of its base; None where there is none to compare with.
        change: after minus before, paired.
        is_better: 1 where more is better, -1 where less is, 0 where neither is.
    """

    after: Measured
    before: Measured | None = None
    change: Measured | None = None
    is_better: int = 1

    @property
    def is_worse(self) -> bool:
        """Whether the model is worse than its base beyond doubt."""
        if self.change is None:
            return False
        return self.change.is_below_zero if self.is_better > 0 else self.is_better < 0 and self.change.is_above_zero


def compare(before: Mapping[str, Items] | None, after: Mapping[str, Items]) -> dict[str, Comparison]:
    """Compare all metrics; those that the base has not, and those with other items, are not paired.

    A metric over the items that a state itself selects (the answered questions) has no pairs.
    """
    found = {}
    for name, items in after.items():
        earlier = None if before is None else before.get(name)
        change = None
        if earlier is not None and len(earlier.values) == len(items.values) and _same(earlier.counts, items.counts):
            change = paired_difference(earlier.values, items.values, items.counts)
        found[name] = Comparison(
            after=items.measured(),
            before=None if earlier is None else earlier.measured(),
            change=change,
            is_better=items.is_better,
        )
    return found


def _same(one: NDArray[np.int64] | None, other: NDArray[np.int64] | None) -> bool:
    return (one is None and other is None) or (one is not None and other is not None and bool((one == other).all()))
