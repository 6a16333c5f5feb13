"""What one method changes in this case: the same recipe dry-run without it and with it."""

from __future__ import annotations

from dataclasses import dataclass

from tunewise.engine.tracking import Kind, Moment
from tunewise.errors import Conflict, InputError, did_you_mean
from tunewise.methods import BY_NAME
from tunewise.planner.case import Case
from tunewise.planner.predict import Prediction, Predictor
from tunewise.planner.space import Axis, Choice, Option, axes


@dataclass(frozen=True)
class Need:
    """What a recipe needs, by a dry run of its own; bytes, FLOPs and seconds of one global step."""

    label: str
    kinds: dict[str, int]
    peak_bytes: int
    peak_moment: str
    step_flops: float
    step_seconds: float
    tokens_per_second: float
    trainable: int


@dataclass(frozen=True)
class Explanation:
    """One method's effect: everything else is the same on both sides."""

    method: str
    label: str
    without: Need
    with_it: Need
    notes: tuple[str, ...]


def explain(method: str, case: Case, predictor: Predictor, around: Prediction) -> Explanation:
    """Return what `method` changes in the recipe of `around`: taken out of it, or put into it.

    Raises:
        InputError: there is no such method, or it has no counterpart that could take its place.
        Conflict: the recipe cannot be without it, or with it.
    """
    if method not in BY_NAME:
        raise InputError(f"There is no method '{method}'.{did_you_mean(method, BY_NAME)}")
    options = axes(case.config, case.machine, case.base, case.wishes)
    axis = next((name for name, each in options.items() if any(method in option.names for option in each)), None)
    if axis is None:
        raise InputError(f"The planner's space has no '{method}'. To bring it in: --with {method}")
    without, with_it = _pair(method, axis, options[axis], around.choice)
    size = around.micro_batch_size
    needs = tuple(_need(choice, size, predictor) for choice in (without, with_it))
    notes = () if method in around.choice[axis].names else (f"The recommended plan does not have {method}.",)
    return Explanation(method, around.choice.label, needs[0], needs[1], notes)


def _pair(method: str, axis: Axis, options: tuple[Option, ...], choice: Choice) -> tuple[Choice, Choice]:
    present = choice[axis]
    if method in present.names:
        others = [option for option in options if method not in option.names]
        other = next((option for option in others if option.label == present.instead_of), None)
        other = other or next(iter(others), None)
        if other is None:
            raise InputError(f"{axis} has no option without '{method}'.")
        return choice.replaced(axis, other), choice
    fitting = [option for option in options if method in option.names]
    usual = next((option for option in fitting if BY_NAME[method]() in option.methods), fitting[0])
    return choice, choice.replaced(axis, usual)


def _need(choice: Choice, size: int, predictor: Predictor) -> Need:
    rows = predictor.rows(choice, max(size, predictor.micro_batch_sizes(choice)[0]))
    problem = next((found for m in choice.methods if (found := m.conflict(choice.recipe(predictor.base, size)))), None)
    if problem is not None:
        raise Conflict(f"'{choice.label}' is no recipe: {problem}")
    estimate = predictor.estimate(choice, rows)
    peak = estimate.peak
    prediction = predictor.predict(choice, rows.micro_batch_size)
    traced = 2 if rows.micro_batches_per_step > 1 else 1
    scale = rows.positions_per_step / (traced * rows.largest_micro_batch)
    in_micro_batches = estimate.flops(Moment.FORWARD, Moment.BACKWARD)
    return Need(
        label=choice.label,
        kinds={kind.name.lower(): int(peak.kinds[kind]) for kind in Kind},
        peak_bytes=estimate.peak_bytes,
        peak_moment=str(estimate.peak_moment),
        step_flops=in_micro_batches * scale + estimate.flops(Moment.UPDATE),
        step_seconds=prediction.step_seconds.middle,
        tokens_per_second=prediction.tokens_per_second.middle,
        trainable=estimate.trainable_parameters,
    )
