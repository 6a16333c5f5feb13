"""Why the recommendation is the best one, in words."""

from __future__ import annotations

from tunewise.planner.choose import NO_BETTER, SAFETY_MARGIN, Limits, Selection
from tunewise.planner.predict import Prediction
from tunewise.planner.space import Choice, Option
from tunewise.units import format_bytes


def reasons(selection: Selection, limits: Limits) -> list[str]:
    """Return sentences about the recommendation: that it fits, what it could not do without, what was faster."""
    best = selection.best
    if best is None:
        return []
    free = 1 - best.peak_bytes / limits.usable_bytes
    found = [
        f"It fits: {format_bytes(best.peak_bytes)} of {format_bytes(limits.usable_bytes)} usable; {free:.0%} stay free "
        f"({SAFETY_MARGIN:.0%} must)."
    ]
    needed = [_needed(option, best.choice, selection) for _, option in best.choice.options if option.instead_of]
    found += [sentence for sentence in needed if sentence]
    if not best.choice.memory_methods:
        found.append("No method that only saves memory is needed.")
    faster = [one for one in selection.front if one.step_seconds.middle < best.step_seconds.middle]
    if faster:
        found.append(_faster(min(faster, key=lambda one: one.step_seconds.middle), best))
    if best.rows.micro_batches_per_step > 1:
        found.append(
            f"A step takes {best.rows.micro_batches_per_step:.3g} micro-batches of {best.rows.words}; "
            "larger ones would not fit or be no faster, and what is learnt does not depend on it."
        )
    return found


def _needed(option: Option, choice: Choice, selection: Selection) -> str | None:
    """Say what is wrong with the same combination without one of its memory methods."""
    axis = next(name for name, each in choice.options if each is option)
    wanted = tuple(option.instead_of if name == axis else each.label for name, each in choice.options)
    label = ", ".join(wanted)
    refused = next((each for each in selection.rejected if each.choice.label == label), None)
    if refused is None:
        return None
    if refused.reason.startswith(NO_BETTER):
        return f"{option.label}: with '{option.instead_of}' only smaller micro-batches fit, which are slower."
    return f"{option.label}: needed, because with '{option.instead_of}' {_about(refused.reason)}."


def _about(reason: str) -> str:
    return f"it {reason}" if reason.startswith(("needs", "takes", "costs")) else reason


def _faster(other: Prediction, best: Prediction) -> str:
    """Say what a faster plan gains, where it differs, and what it costs."""
    gain = 1 - other.step_seconds.middle / best.step_seconds.middle
    pairs = zip(other.choice.options, best.choice.options, strict=True)
    apart = [(new, old) for (_, new), (_, old) in pairs if new != old]
    there, here = (", ".join(option.label for option in side) for side in zip(*apart, strict=True))
    if other.choice.num_approximations > best.choice.num_approximations:
        price = "it learns with coarser numbers"
    else:
        price = f"it needs {format_bytes(other.peak_bytes)}"
    return f"With {there} instead of {here} it would take {gain:.0%} less time, but {price}."
