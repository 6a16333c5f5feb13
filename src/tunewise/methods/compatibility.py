"""Which wishes of a recipe contradict each other: every method is asked, each slot that holds only one is checked."""

from __future__ import annotations

from tunewise.errors import Conflict
from tunewise.recipe import Recipe, Slot

SINGLE_SLOTS = (Slot.PRECISION, Slot.ATTENTION, Slot.LOSS, Slot.OPTIMIZER)
"""Slots in which a second method would undo the first."""


def refuse_conflicts(recipe: Recipe) -> None:
    """Raise Conflict with everything that `conflicts` finds."""
    found = conflicts(recipe)
    if found:
        raise Conflict("The recipe contradicts itself:\n  " + "\n  ".join(found))


def conflicts(recipe: Recipe) -> list[str]:
    """Return what cannot be honoured together, each a sentence; empty when all is well."""
    found = [problem for method in recipe.methods or () if (problem := method.conflict(recipe)) is not None]
    for slot in SINGLE_SLOTS:
        names = [method.name for method in recipe.in_slot(slot)]
        if len(names) > 1:
            found.append(f"{' and '.join(names)} both set the {slot.name.lower()}; keep one of them")
    return list(dict.fromkeys(found))
