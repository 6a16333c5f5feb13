"""What footprints say of a place of the step, and what a change of one method adds to it."""

from __future__ import annotations

import numpy as np

from tunewise.engine.tracking import Kind
from tunewise.planner.footprint import Bytes, Footprint


def moment_of(place: str) -> str:
    """Return the moment in a place's name."""
    return place.split(" ")[0]


def difference(new: Footprint, old: Footprint, name: str, tokens: float, gradients: float | None) -> Bytes:
    """Return what a change adds to a place; to a moment that was not traced, the optimizer's state only."""
    if not all(any(moment_of(other) == moment_of(name) for other in seen.places) for seen in (new, old)):
        change = np.zeros(len(Kind))
        change[Kind.OPTIMIZER] = (bytes_at(new, "update head", tokens) - bytes_at(old, "update head", tokens))[
            Kind.OPTIMIZER
        ]
        return change
    return bytes_at(new, name, tokens, gradients) - bytes_at(old, name, tokens, gradients)


def bytes_at(seen: Footprint, name: str, tokens: float, gradients: float | None = None) -> Bytes:
    """Return the bytes of a place; where a footprint has no such place, of the fullest one of the same moment."""
    lines = seen.places.get(name)
    if lines is not None:
        return lines.at(tokens, gradients)
    same = [other.at(tokens, gradients) for key, other in seen.places.items() if moment_of(key) == moment_of(name)]
    return max(same, key=lambda each: float(each.sum())) if same else np.zeros(len(Kind))
