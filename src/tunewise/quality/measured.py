"""What the measures give, as plain values: reports are read without torch and numpy."""

from __future__ import annotations

from tunewise.recipe import Value


class Measured(Value):
    """A quantity that was estimated from `num` documents or questions.

    Attributes:
        middle: the estimate.
        low, high: its 95 % interval.
        noise_floor: the size that a difference must have to be told from none (95 %) with so many.
        num: how many independent pieces it comes from.
    """

    middle: float
    low: float
    high: float
    noise_floor: float
    num: int

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0.0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high < 0.0


class Forgetting(Value):
    """What was forgotten, nats per token of general text; below zero something was learnt.

    Attributes:
        change: loss after minus loss before, over all domains.
        domains: the same for each domain.
        base_loss, loss: before and after.
    """

    change: Measured
    domains: dict[str, Measured]
    base_loss: float
    loss: float


class Overfitting(Value):
    """What tells learning from memorizing.

    Attributes:
        gap: nats by which the gap between held-out and training documents grew.
        exposure: bits; 1.44 is what chance gives (the mean of -log2 of a uniform rank), so much above it is memorized.
    """

    gap: Measured
    exposure: Measured
