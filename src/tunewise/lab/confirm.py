"""The winner against the runner-up once more: fresh seeds, equal tokens, in turns."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from tunewise.lab.arms import ArmSpec, arm_recipe, beta2_of
from tunewise.lab.findings import Confirmation, Contender
from tunewise.lab.laboratory import Laboratory
from tunewise.lab.outcome import Failed, Interval, Measurement, OutOfMemory
from tunewise.lab.trial import Trial
from tunewise.quality.measured import Measured
from tunewise.recipe import Recipe
from tunewise.units import format_seconds

FRESH = 1000
"""Seeds of the confirmation begin so much higher, so that none was seen before."""

FASTER = 0.02
"""Differences in speed up to this share are none."""


@dataclass(frozen=True)
class Candidate:
    """A recipe that may win, and what was measured of it before."""

    label: str
    recipe: Recipe
    peak_tensor_bytes: int | None


def confirm(
    laboratory: Laboratory,
    winner: Candidate,
    runner_up: Candidate | None,
    *,
    budget_tokens: int,
    num_seeds: int,
    expected_seconds: float,
    tie_band: float,
    max_forgetting: float | None = None,
) -> tuple[Confirmation, bool]:
    """Train both with fresh seeds and return what came of it, and whether the runner-up should win instead.

    Args:
        winner, runner_up: complete recipes of the same batch.
        budget_tokens: supervised tokens of each training.
        num_seeds: of each.
        expected_seconds: of one training.
        tie_band: losses that differ by less are equal.
        max_forgetting: the budget, nats per token; None: forgetting is not measured.
    """
    both = [winner] if runner_up is None else [winner, runner_up]
    measured: dict[str, list[Measurement]] = {candidate.label: [] for candidate in both}
    problems: dict[str, str] = {}
    for seed in range(num_seeds):
        for candidate in both:
            measures = max_forgetting is not None
            outcome = _train(laboratory, candidate, seed, budget_tokens, expected_seconds, measures_forgetting=measures)
            if isinstance(outcome, Measurement):
                measured[candidate.label].append(outcome)
            else:
                problems[candidate.label] = outcome.reason
    contenders = [_contender(c, measured[c.label], problems.get(c.label, "measured")) for c in both]
    first, second = contenders[0], contenders[1] if len(contenders) > 1 else None
    swap = second is not None and _should_swap(first, second, tie_band, max_forgetting)
    chosen, other = (second, first) if swap and second is not None else (first, second)
    sentence = _sentence(chosen, other, num_seeds, swap=swap)
    if max_forgetting is not None and _forgets_too_much(chosen, max_forgetting):
        sentence += f" It forgets more than the {max_forgetting:g} nats that a whole training may."
    return Confirmation(winner=chosen, runner_up=other, num_seeds=num_seeds, sentence=sentence), swap


def _train(
    laboratory: Laboratory,
    candidate: Candidate,
    seed: int,
    budget_tokens: int,
    expected_seconds: float,
    *,
    measures_forgetting: bool,
) -> Measurement | OutOfMemory | Failed:
    recipe = candidate.recipe
    batch, rate = recipe.batch.supervised_tokens, recipe.training.learning_rate
    assert batch is not None
    assert rate is not None
    spec = ArmSpec(2, batch, rate, beta2_of(recipe.methods or ()), recipe.seed + FRESH + seed, budget_tokens)
    return laboratory.run(
        "confirmation",
        Trial.of("learn", arm_recipe(recipe, spec), measures_forgetting=measures_forgetting),
        params={"seed": spec.seed, "is_winner": candidate.label == "winner"},
        role=f"confirmation of {candidate.label}, seed {seed + 1}",
        expected_seconds=expected_seconds,
    )


def _contender(candidate: Candidate, measured: list[Measurement], outcome: str) -> Contender:
    losses = [m.loss for m in measured if m.loss is not None]
    steps = [m.step_seconds.middle for m in measured if m.step_seconds is not None]
    rates = [m.tokens_per_second.middle for m in measured if m.tokens_per_second is not None]
    return Contender(
        label=candidate.label,
        loss=_spread(losses),
        step_seconds=_spread(steps),
        tokens_per_second=_spread(rates),
        peak_tensor_bytes=candidate.peak_tensor_bytes,
        forgetting=_worst_bounds([m.forgetting for m in measured if m.forgetting is not None]),
        outcome=outcome,
    )


def _spread(values: list[float]) -> Interval | None:
    """The mean and the range: of two or three values nothing finer can be said."""
    if not values:
        return None
    return Interval(middle=statistics.mean(values), low=min(values), high=max(values))


def _worst_bounds(forgetting: list[Measured]) -> Interval | None:
    """The mean over seeds, within the lowest and the highest bound of each seed's own interval."""
    if not forgetting:
        return None
    return Interval(
        middle=statistics.mean(each.middle for each in forgetting),
        low=min(each.low for each in forgetting),
        high=max(each.high for each in forgetting),
    )


def _forgets_too_much(contender: Contender, budget: float) -> bool:
    return contender.forgetting is not None and contender.forgetting.middle > budget


def _should_swap(first: Contender, second: Contender, tie_band: float, max_forgetting: float | None) -> bool:
    """The runner-up wins when the winner failed, lost by more than the noise, or is slower at the same loss.

    Before all of that, one that keeps within the budget of forgetting wins against one that does not.
    """
    if second.loss is None or second.tokens_per_second is None:
        return False
    if first.loss is None or first.tokens_per_second is None:
        return True
    if max_forgetting is not None:
        over = [_forgets_too_much(each, max_forgetting) for each in (first, second)]
        if over[0] != over[1]:
            return over[0]
    if first.loss.middle > second.loss.middle + tie_band:
        return True
    is_tied = abs(first.loss.middle - second.loss.middle) <= tie_band
    return is_tied and second.tokens_per_second.middle > (1 + FASTER) * first.tokens_per_second.middle


def _sentence(chosen: Contender, other: Contender | None, num_seeds: int, *, swap: bool) -> str:
    if chosen.loss is None or chosen.tokens_per_second is None or chosen.step_seconds is None:
        return f"Neither could be confirmed: {chosen.outcome}."
    seeds = f"{num_seeds} fresh seed{'s' if num_seeds > 1 else ''}"
    said = (
        f"With {seeds} '{chosen.label}' reaches {chosen.loss.middle:.4f} nats at "
        f"{chosen.tokens_per_second.middle:,.0f} tokens/s ({format_seconds(chosen.step_seconds.middle)} a step)"
    )
    if other is None or other.loss is None or other.tokens_per_second is None:
        return said + "; there was no second recipe to compare it with."
    said += f", '{other.label}' {other.loss.middle:.4f} nats at {other.tokens_per_second.middle:,.0f} tokens/s"
    return said + (": the runner-up of the study wins." if swap else ".")
