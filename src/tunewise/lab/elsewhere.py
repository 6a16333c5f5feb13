"""What would change on another machine: the tuned recipe there, and what would have to be added for it to fit."""

from __future__ import annotations

from tunewise.errors import Conflict, InputError
from tunewise.lab.factors import FactorSpace, On, factor_space
from tunewise.lab.findings import Elsewhere
from tunewise.lab.outcome import Interval
from tunewise.lab.tuning import Tuning
from tunewise.machine.catalogue import find
from tunewise.planner.choose import SAFETY_MARGIN
from tunewise.units import format_bytes

MACHINES = ("T4", "RTX 4090", "L40S", "H100 SXM", "H200")
"""A small card, a large one, and what is rented."""


def elsewhere(tuning: Tuning) -> tuple[Elsewhere, ...]:
    """Predict the tuned recipe on other machines; where it does not fit, with what saves memory added step by step."""
    return tuple(_on(tuning, name) for name in MACHINES)


def _on(tuning: Tuning, name: str) -> Elsewhere:
    machine = find(name)
    recipe = tuning.base.replace(device=machine.kind)
    try:
        space = factor_space(recipe, tuning.place.plan.config, machine, tuning.place.predictor(recipe, machine))
        return _first_that_fits(tuning, space)
    except (Conflict, InputError) as error:
        return _nothing(name, str(error))


def _first_that_fits(tuning: Tuning, space: FactorSpace) -> Elsewhere:
    machine = space.predictor.machine
    limit = machine.usable_memory_bytes * (1 - SAFETY_MARGIN)
    here = space.of_base()
    on: On = here
    savers = [f.name for f in space.factors if f.saves_memory_only and f.name not in here]
    for added in ("", *savers):
        on = on | ({added} - {""})
        if space.refusal(on) is not None:
            continue
        prediction = space.predictor.predict(space.choice(on), space.micro_batch_size(on))
        if prediction.peak_bytes <= limit:
            rate, step = prediction.tokens_per_second, prediction.step_seconds
            steps = tuning.place.run_tokens / (tuning.base.batch.supervised_tokens or tuning.place.batch_tokens)
            return Elsewhere(
                machine=machine.name,
                label=space.label(on),
                peak_bytes=prediction.peak_bytes,
                tokens_per_second=Interval(middle=rate.middle, low=rate.low, high=rate.high),
                run_seconds=Interval(middle=step.middle * steps, low=step.low * steps, high=step.high * steps),
                change=_change(space, here, on),
            )
    return _nothing(
        machine.name,
        f"does not fit: {format_bytes(prediction.peak_bytes)} of {format_bytes(limit)} with all that saves memory",
    )


def _nothing(machine: str, reason: str) -> Elsewhere:
    return Elsewhere(
        machine=machine, label="", peak_bytes=None, tokens_per_second=None, run_seconds=None, change=reason
    )


def _change(space: FactorSpace, here: On, there: On) -> str:
    added = [name for name in space.names if name in there - here]
    return f"with {' and '.join(added)} added" if added else "the same methods"
