"""Which combination is best: what fits, what is not needed, what is dominated, and why.

The order of reasons is fixed:

1. A combination must fit into memory with the safety margin, and keep to the limits of time and cost.
2. What fits without a memory method does not get one, unless that makes it clearly faster.
3. Full fine-tuning by approximations is pointless where LoRA fits without any: both learn another problem.
4. Of what is left the recommendation has the fewest approximations, then the shortest time, then the least memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunewise.engine.estimate import Estimate
from tunewise.engine.tracking import Kind
from tunewise.errors import Conflict, DoesNotFit
from tunewise.planner.predict import Prediction, Predictor
from tunewise.planner.space import ADAMW, ALL_BLOCKS, FULL, KEPT, LORA, Choice, Refused
from tunewise.recipe import Fidelity, Recipe
from tunewise.units import format_bytes, format_seconds

NO_BETTER = "no better than"
"""How the reason of a dominated plan begins."""

SAFETY_MARGIN = 0.08
"""Of the usable memory this part stays free: the allocator's holes, and what an estimate may miss."""

EFFICIENT_POSITIONS = 2048
"""A micro-batch of so many positions keeps a device busy; a plan that fits with it is not short of memory."""

CLEARLY_FASTER = 0.10
"""A memory method that is not needed must save this part of the time to be worth its approximation."""

ALMOST_AS_FAST = 0.02
"""Of plans, or micro-batches, whose speed differs by less the one with less memory is taken."""


@dataclass(frozen=True)
class Limits:
    """What a plan must keep to.

    Attributes:
        usable_bytes: what tensors can have on the machine, or less if the user says so.
        time_seconds, cost: of the whole run; None for no limit.
        run_steps: global steps of the whole run; None when nobody said how long it is.
        price_per_hour: None when unknown.
    """

    usable_bytes: int
    time_seconds: float | None = None
    cost: float | None = None
    run_steps: int | None = None
    price_per_hour: float | None = None

    @property
    def peak_bytes(self) -> int:
        """What a plan may take."""
        return int(self.usable_bytes * (1 - SAFETY_MARGIN))

    @property
    def are_of_the_run(self) -> bool:
        """Whether time or money is limited."""
        return self.time_seconds is not None or self.cost is not None

    def exceeded(self, step_seconds: float) -> str | None:
        """Say which limit of time or cost is broken by steps of so many seconds, or return None."""
        if self.run_steps is None:
            return None
        seconds = step_seconds * self.run_steps
        if self.time_seconds is not None and seconds > self.time_seconds:
            return f"takes {format_seconds(seconds)}, more than {format_seconds(self.time_seconds)}"
        if self.cost is not None and self.price_per_hour is not None:
            price = self.price_per_hour * seconds / 3600
            if price > self.cost:
                return f"costs {price:.2f}, more than {self.cost:g}"
        return None


class NothingFits(DoesNotFit):
    """No combination keeps to the limits.

    Attributes:
        nearest: the nearest recipe that fits, None when there is none.
        give_up: what it takes away from what was asked for.
    """

    def __init__(self, message: str, nearest: Recipe | None, give_up: str) -> None:
        super().__init__(message)
        self.nearest, self.give_up = nearest, give_up


@dataclass(frozen=True)
class Selection:
    """What came of the search.

    Attributes:
        best: the recommendation, None when nothing fits.
        candidates: everything that fits, is needed and keeps to the limits, the best first.
        front: those of them that no other beats in memory, time and quality at once.
        rejected: every other combination with its reason.
        smallest: the combination that needs least, whether it fits or not; None when nothing was predicted.
        num_combinations: how many were judged.
        dry_run: of the recommendation's own recipe; None before it was confirmed.
    """

    best: Prediction | None
    candidates: tuple[Prediction, ...]
    front: tuple[Prediction, ...]
    rejected: tuple[Refused, ...]
    smallest: Prediction | None
    num_combinations: int
    dry_run: Estimate | None = None


def quality(choice: Choice) -> tuple[int, int]:
    """Return the expected quality class as (fidelity, number of approximations); smaller is closer to the plain run."""
    return list(Fidelity).index(choice.fidelity), choice.num_approximations


def ranked(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Sort: fewest approximations, then shortest time (almost as fast counts as fast), then least memory."""
    left, found = list(predictions), []
    while left:
        fewest = min(each.choice.num_approximations for each in left)
        level = [each for each in left if each.choice.num_approximations == fewest]
        fastest = min(each.step_seconds.middle for each in level)
        near = [each for each in level if each.step_seconds.middle <= (1 + ALMOST_AS_FAST) * fastest]
        best = min(near, key=lambda each: (each.peak_bytes, len(each.choice.methods)))
        found.append(best)
        left.remove(best)
    return found


def select(predictor: Predictor, choices: Sequence[Choice], limits: Limits) -> Selection:
    """Predict every combination that is not ruled out by a cheaper argument, and choose."""
    search = _Search(predictor, limits)
    for choice in sorted(choices, key=lambda each: (len(each.memory_methods), each.num_approximations)):
        search.consider(choice)
    return search.selection()


class _Search:
    """Goes through combinations from few memory methods to many."""

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.rejected: list[Refused] = []
        self.fitting: list[Prediction] = []
        self.smallest: Prediction | None = None
        self._fits_by_context: dict[tuple[str, ...], list[Prediction]] = {}
        self._least_by_label: dict[str, Prediction] = {}

    def consider(self, choice: Choice) -> None:
        try:
            reason = self._not_needed(choice) or self._approximates_in_vain(choice)
            reason = reason or self._hopeless(choice) or self._predict(choice)
        except Conflict as conflict:
            reason = str(conflict)
        if reason is not None:
            self.rejected.append(Refused(choice, reason))

    def _not_needed(self, choice: Choice) -> str | None:
        """The paper's rule: what fits without a memory method does not get one."""
        for other in self._fits_by_context.get(choice.without_memory_methods, []):
            if other.choice.memory_methods < choice.memory_methods and self._is_comfortable(other):
                spared = ", ".join(sorted(choice.memory_methods - other.choice.memory_methods))
                return f"fits without {spared} ({format_bytes(other.peak_bytes)})"
        return None

    def _approximates_in_vain(self, choice: Choice) -> str | None:
        if choice["tuning"] is not FULL or choice.num_approximations == 0:
            return None
        for other in self.fitting:
            if other.choice["tuning"] is LORA and not other.choice.num_approximations:
                coarse = ", ".join(option.label for _, option in choice.options if option.is_approximation)
                return f"full fine-tuning only by {coarse}, where LoRA fits without approximation"
        return None

    def _is_comfortable(self, prediction: Prediction) -> bool:
        rows = prediction.rows
        whole_step = rows.micro_batches_per_step <= 1
        return whole_step or rows.largest_micro_batch >= EFFICIENT_POSITIONS

    def _hopeless(self, choice: Choice) -> str | None:
        """Find reasons that cost little: weights, a state, or a relative that needs less and does not fit.

        Full fine-tuning is asked about time before it is predicted, where an adapter needs less memory anyway: its
        traces would serve nothing, while the adapter's serve the nearest recipe that is looked for when nothing keeps
        to the limits.
        """
        limit = self.limits.peak_bytes
        bound, what = self.predictor.lower_bound(choice)
        if bound > limit:
            return f"{what} are {format_bytes(bound)} of {format_bytes(limit)}"
        has_smaller = self.smallest is not None and self.smallest.choice["tuning"] is not FULL
        if choice["tuning"] is FULL and self.limits.are_of_the_run and has_smaller:
            exceeded = self.limits.exceeded(self.predictor.least_seconds(choice))
            if exceeded is not None:
                return f"without its update and with all activations kept it {exceeded}"
        if choice["tuning"] is FULL:
            state = self.predictor.state_bytes(choice)
            if state > limit:
                return f"weights, gradients and optimizer state need {format_bytes(state)} of {format_bytes(limit)}"
        if choice["checkpointing"] not in (ALL_BLOCKS, KEPT):
            least = self._least(choice.replaced("checkpointing", ALL_BLOCKS)).peak_bytes
            if least > limit:
                return f"even with all blocks checkpointed it needs {format_bytes(least)} of {format_bytes(limit)}"
        if choice["optimizer"].instead_of == ADAMW.label and not choice.updates_in_backward:
            plain = self._least(choice.replaced("optimizer", ADAMW))
            least = plain.peak_bytes - plain.kinds[Kind.OPTIMIZER]
            if least > limit:
                return f"even without any optimizer state it needs {format_bytes(least)} of {format_bytes(limit)}"
        return None

    def _least(self, choice: Choice) -> Prediction:
        """Return what a combination needs with its smallest micro-batch."""
        label = choice.label
        if label not in self._least_by_label:
            self._least_by_label[label] = self.predictor.predict(choice, self.predictor.micro_batch_sizes(choice)[0])
        return self._least_by_label[label]

    def _predict(self, choice: Choice) -> str | None:
        """Keep the best micro-batch that fits, or say why there is none."""
        fitting: list[Prediction] = []
        for size in self.predictor.micro_batch_sizes(choice):
            prediction = self.predictor.predict(choice, size)
            if self.smallest is None or prediction.peak_bytes < self.smallest.peak_bytes:
                self.smallest = prediction
            if prediction.peak_bytes > self.limits.peak_bytes:
                break
            fitting.append(prediction)
        if not fitting:
            return self._too_large(prediction)
        fastest = min(each.step_seconds.middle for each in fitting)
        best = next(each for each in fitting if each.step_seconds.middle <= (1 + ALMOST_AS_FAST) * fastest)
        exceeded = self.limits.exceeded(best.step_seconds.middle)
        if exceeded is not None:
            return exceeded
        self._fits_by_context.setdefault(choice.without_memory_methods, []).append(best)
        self.fitting.append(best)
        return None

    def _too_large(self, prediction: Prediction) -> str:
        need, limit = format_bytes(prediction.peak_bytes), format_bytes(self.limits.peak_bytes)
        largest = max(prediction.kinds, key=lambda kind: prediction.kinds[kind])
        return (
            f"needs {need} of {limit} with {prediction.rows.words} of {prediction.rows.width} tokens; "
            f"{largest.name.lower()} {format_bytes(prediction.kinds[largest])}"
        )

    def selection(self) -> Selection:
        """Sort what fits and reject what a simpler plan makes pointless."""
        candidates = []
        for prediction in self.fitting:
            simpler = self._simpler_and_no_slower(prediction)
            if simpler is None:
                candidates.append(prediction)
            else:
                spared = ", ".join(sorted(prediction.choice.memory_methods - simpler.choice.memory_methods))
                self.rejected.append(
                    Refused(prediction.choice, f"fits without {spared}, which would not make it clearly faster")
                )
        candidates = ranked(candidates)
        front = tuple(one for one in candidates if not any(_beats(other, one) for other in candidates))
        best = candidates[0] if candidates else None
        for one in candidates:
            if best is not None and one is not best and one not in front:
                self.rejected.append(Refused(one.choice, why_not(one, candidates)))
        count = len(self.fitting) + len(self.rejected)
        return Selection(best, tuple(candidates), front, tuple(self.rejected), self.smallest, count)

    def _simpler_and_no_slower(self, prediction: Prediction) -> Prediction | None:
        for other in self._fits_by_context[prediction.choice.without_memory_methods]:
            is_simpler = other.choice.memory_methods < prediction.choice.memory_methods
            needed = (1 - CLEARLY_FASTER) * other.step_seconds.middle
            if is_simpler and prediction.step_seconds.middle > needed:
                return other
        return None


def why_not(one: Prediction, candidates: Sequence[Prediction]) -> str:
    """Say which candidate is at least as good in everything."""
    other = next(each for each in candidates if _beats(each, one))
    return (
        f"{NO_BETTER} '{other.choice.label}' in memory ({format_bytes(one.peak_bytes)} against "
        f"{format_bytes(other.peak_bytes)}), time and quality"
    )


def _beats(first: Prediction, second: Prediction) -> bool:
    """Say whether the first is no worse in memory, time and quality, and better in one of them (or just simpler)."""
    a, b = ((each.peak_bytes, each.step_seconds.middle, quality(each.choice)) for each in (first, second))
    if a == b:
        return len(first.choice.methods) < len(second.choice.methods)
    return a[0] <= b[0] and a[1] <= b[1] and a[2] <= b[2]
