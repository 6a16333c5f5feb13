"""What came of the cures that a tuning tried on a model which the gate had refused, as data for the report."""

from __future__ import annotations

from typing import Literal

from tunewise.quality.measured import Measured
from tunewise.recipe import Value

CureKind = Literal["uncured", "afterwards", "training"]


class CurePoint(Value):
    """One state of the model: the uncured one, or what a cure made of it.

    Attributes:
        name: of the cure, short ("replay-5").
        label: in words ("replay of 5 % general text").
        kind: "afterwards" is made of what was trained, without training again.
        gain: how far the loss on held-out documents fell, nats per supervised token; None where it is not known.
        forgetting: how far the loss on general text rose, nats per token; None where it is not known.
        kept: share of the uncured model's gain; None where that had none.
        passed: whether the gate passes it; None where the whole gate was not asked, because one number said no already.
        is_cure: whether it passes and has kept the gain.
        verdict: in words.
        seconds: what trying it took.
        folder: where it lies; "" where it was not saved.
        command: makes it again.
    """

    name: str
    label: str
    kind: CureKind
    gain: Measured | None
    forgetting: Measured | None
    kept: float | None = None
    passed: bool | None = None
    is_cure: bool = False
    verdict: str
    seconds: float = 0.0
    folder: str = ""
    command: str = ""


class UntriedCure(Value):
    """A cure that was not tried: why, and how it would be; `is_needless` when a cheaper one was good enough."""

    name: str
    label: str
    reason: str
    is_needless: bool = False
    expected_seconds: float
    command: str


class CureFindings(Value):
    """Everything about the cures.

    Attributes:
        uncured: the model that the gate refused.
        points: what was tried, in that order.
        untried: what was not.
        chosen: name of the point that became the result; "" when none is a cure.
        max_forgetting: the budget of the recipe, nats per token.
        sentences: in words.
    """

    uncured: CurePoint
    points: tuple[CurePoint, ...]
    untried: tuple[UntriedCure, ...]
    chosen: str
    max_forgetting: float
    sentences: tuple[str, ...]

    @property
    def chosen_point(self) -> CurePoint | None:
        """The point that became the result."""
        return next((point for point in self.points if point.name == self.chosen), None)
