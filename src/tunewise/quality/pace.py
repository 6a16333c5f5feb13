"""How much is measured: as much as planned, or so much less that measuring keeps to its share of the training's time.

The material's pieces lie in an order of their own, so any beginning of it is a fair sample of the whole. The base is
measured on the smallest one first (`material.FEWEST_DOCUMENTS` pieces of every kind), which tells what a token and an
answer take here; what is then added follows from what the training will take, the tuned state's from what it took. The
smallest sample is always measured: of less, the intervals say nothing. So a training that is too short for it gives
measuring a larger share.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunewise.quality.material import Material

TRAINING_COST = 1.8
"""A token in training, in tokens that are measured: backward takes twice a forward pass, but few short documents, one a
row, are measured slower than packed rows are trained (2.0 with the embedded model). On the low side, so that the base
does not use up what the tuned state needs."""

_GRID = 32


@dataclass(frozen=True)
class Pace:
    """What measuring takes on this machine, with this model.

    Attributes:
        token_seconds: of a token in a forward pass.
        answer_seconds: of an answer.
    """

    token_seconds: float
    answer_seconds: float

    @staticmethod
    def of(material: Material, loss_seconds: float, generation_seconds: float) -> Pace:
        """Return the pace at which `material` was measured."""
        return Pace(loss_seconds / max(1, material.num_tokens), generation_seconds / max(1, material.num_answers))

    def seconds(self, material: Material) -> float:
        """Return what one state's measurement on `material` takes."""
        return self.token_seconds * material.num_tokens + self.answer_seconds * material.num_answers


def fraction_before(material: Material, pace: Pace, training_tokens: float, spent: float, share: float) -> float:
    """Return how much of `material` both states can be measured on within `share` of the training that is to come.

    Args:
        material: all that was planned.
        pace: found on its smallest part.
        training_tokens: that will pass through the model in training.
        spent: seconds that went into preparing the material.
        share: of the training's time.
    """
    allowed = share * TRAINING_COST * training_tokens * pace.token_seconds - spent
    return _largest(material, pace, allowed / 2, 1.0)


def fraction_after(
    material: Material, pace: Pace, training_seconds: float, spent: float, share: float, before: float
) -> float:
    """Return how much of `material` the tuned state can be measured on, `before` at most, which is what the base was.

    Args:
        material: all that was planned.
        pace: found with the base.
        training_seconds: that the training took.
        spent: seconds that measuring has taken so far.
        share: of the training's time.
        before: the fraction that the base was measured on.
    """
    return _largest(material, pace, share * training_seconds - spent, before)


def _largest(material: Material, pace: Pace, allowed: float, most: float) -> float:
    """Return the largest fraction, on a grid, whose measurement takes `allowed` seconds at most; 0 is the smallest."""
    steps = (step / _GRID for step in range(_GRID, 0, -1))
    return next((step for step in steps if step <= most and pace.seconds(material.part(step)) <= allowed), 0.0)
