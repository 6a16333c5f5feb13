"""Which methods reach the chosen batch most cheaply, and what each one contributes.

    predict      the planner says what cannot fit; that is not tried
    baseline     everything off that can be off
    around       the user's own methods, and these with one of them switched: what decides most is measured first
    alone        each method by itself; its first loss and gradient are compared with the baseline's (`gate`)
    factorial    a two-level design over the methods that passed; effects and interactions on logarithms
    candidates   what the measured effects promise to be fastest, in turns
    ladder       methods of the winner added one after another
    left out     the winner without each of its methods
    beyond       the winner with products in 8 bits, where the machine has them: shown, not chosen

Every trial learns from the same documents in the same order, so a loss stands beside each speed at equal tokens. Equal
recipes are equal trials and are measured once, whatever they are needed for.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from tunewise.errors import Conflict, InputError
from tunewise.lab.design import Design, two_level
from tunewise.lab.effects import EffectModel, fit_effects
from tunewise.lab.expected import expected_forgetting, expected_seconds
from tunewise.lab.factors import FactorSpace, On
from tunewise.lab.gate import Verdict, compare
from tunewise.lab.laboratory import Laboratory
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory
from tunewise.lab.trial import Trial
from tunewise.lab.tried import Tried, nats_lost, why_out
from tunewise.methods import LoRA, Quantize, SupervisedLoss
from tunewise.methods.compatibility import conflicts
from tunewise.planner.predict import Prediction
from tunewise.recipe import Recipe

CLEARLY_FASTER = 0.10
"""A method that exists to save memory must save this part of the time to be chosen where memory suffices."""

NARROW = "products in 8 bits"

NEEDED = ("baseline", "candidate")
"""Roles of trials without which there is no answer; all others end with the budget."""

FINALISTS = 3
AROUND_SHARE = 0.6
"""Of the budget, what may be spent before the methods are tried alone."""

NOTICEABLE = 0.02
"""A switch that changes the time by less changes nothing."""

SURELY_FITS = 0.5
"""Of the limit: a baseline that needs no more leaves every other combination enough, and no more is predicted."""

EVALUATED = 32
"""Validation documents of a trial; the same ones in each, so few are enough to compare by."""

REPEATS = 3
"""How often the finalists are measured, in turns."""


@dataclass
class MethodStudy:
    """Runs the trials of the methods; `run` is the whole procedure.

    Attributes:
        space: the factors; it shrinks as methods turn out not to fit or not to agree.
        limit_bytes: what a recipe may take, the safety margin taken off.
        budget_seconds: for all trials together.
        wanted, unwanted: factors that the user wants on or off.
        warm_up, steps: of every trial.
        max_forgetting: the recipe's budget, nats per token; None: forgetting is not measured.
    """

    laboratory: Laboratory
    space: FactorSpace
    limit_bytes: int
    budget_seconds: float
    step_seconds: float
    wanted: On = frozenset()
    unwanted: On = frozenset()
    warm_up: int = 1
    steps: int = 4
    max_forgetting: float | None = None
    tried: dict[On, Tried] = field(default_factory=dict)
    excluded: list[tuple[str, str]] = field(default_factory=list)
    ladder: list[On] = field(default_factory=list)
    model_time: EffectModel | None = None
    model_memory: EffectModel | None = None
    _baseline_bytes: float | None = None
    winner: On = frozenset()
    runner_up: On | None = None
    beyond: Tried | None = None

    def run(self) -> None:
        """Find the winner and what each method contributes, as far as the budget goes.

        Raises:
            InputError: nothing could be measured, or nothing fits.
        """
        self._hold_what_must_be_on()
        self._try(frozenset(), "baseline")
        self._around()
        self._alone()
        self._factorial()
        self._choose()
        self._ladder()
        self._left_out()
        self._beyond()

    def _hold_what_must_be_on(self) -> None:
        """Without some methods nothing fits: they stay on, the most harmless first."""
        self.space = self.space.without(self.unwanted & set(self.space.names)).holding(
            self.wanted & set(self.space.names)
        )
        order = sorted(self.space.factors, key=lambda f: (not f.saves_memory_only, f.fidelity == "learning"))
        for factor in order:
            if self._predicted_to_fit(frozenset()):
                return
            needed = [switch.requires for switch in self.space.switches if switch.factor.name == factor.name]
            held = {factor.name, *itertools.chain(*needed)}
            self.space = self.space.holding(held & set(self.space.names))
            self.excluded.append((f"without {factor.name}", "predicted not to fit into memory"))

    def _predicted_to_fit(self, on: On) -> bool:
        """Say whether the planner lets a combination be tried; where the baseline is far from the limit, at once."""
        if self._baseline_bytes is None:
            plain = self.predicted(frozenset())
            self._baseline_bytes = math.inf if plain is None else float(plain.peak_bytes)
        if self._baseline_bytes <= SURELY_FITS * self.limit_bytes:
            return True
        prediction = self.predicted(on)
        return prediction is None or prediction.peak_bytes <= self.limit_bytes

    def predicted(self, on: On) -> Prediction | None:
        """Return what the planner predicts, None where it cannot tell."""
        space = self.space
        try:
            return space.predictor.predict(space.choice(on), space.micro_batch_size(on))
        except (Conflict, InputError):
            return None

    @property
    def own(self) -> On:
        """The user's methods, without those that only save memory."""
        return self.space.of_base() - self._memory()

    def _memory(self) -> On:
        """Methods that do nothing but save memory."""
        return frozenset(f.name for f in self.space.factors if f.saves_memory_only and f.fidelity != "learning")

    def _around(self) -> None:
        """Switch one factor of the user's recipe at a time, then all those together that made it faster.

        Effects of methods alone say little about a recipe of several (bf16 makes padded rows faster and packed ones
        slower on some processors), and a short budget does not pay for a factorial. So the neighbours of the recipe
        come first, and what they show is where candidates are looked for.
        """
        own, started = self.own, self._budget_left()
        if self.space.refusal(own) is not None or self._try(own & self._learning(), "alone") is None:
            return
        found = self._try(own, "candidate")
        if found is None or not found.is_sound:
            return
        faster = own
        for factor in sorted(self.space.factors, key=lambda each: each.saves_memory_only):
            on = own ^ {factor.name}
            if started - self._budget_left() > AROUND_SHARE * self.budget_seconds:
                break
            if self.space.refusal(on) is not None or not self.keeps_what_is_learnt(on):
                continue
            neighbour = self._try(on, "around")
            needed = CLEARLY_FASTER if factor.saves_memory_only else NOTICEABLE
            if neighbour is not None and neighbour.is_sound and neighbour.seconds < (1 - needed) * found.seconds:
                faster = faster ^ {factor.name}
        if self.space.refusal(faster) is None:
            self._try(faster, "around")

    def _learning(self) -> On:
        return frozenset(factor.name for factor in self.space.factors if factor.fidelity == "learning")

    def _alone(self) -> None:
        """Try each method by itself; one that fails or whose numbers disagree leaves the study."""
        for name in self.space.names:
            on = self.closed(frozenset({name}))
            found = self._try(on, "alone")
            if found is None:
                continue
            if not found.is_sound:
                self._exclude(name, why_out(found))
        baseline = self.tried.get(frozenset())
        if baseline is None or (not baseline.measured and not any(t.measured for t in self.tried.values())):
            raise InputError(
                "None of the trials of the methods could be measured: "
                + (why_out(baseline) if baseline else "the baseline was not tried")
            )

    def _exclude(self, name: str, reason: str) -> None:
        self.excluded.append((name, reason))
        self.space = self.space.without([name])

    def closed(self, on: On) -> On:
        """Return a set of factors with what its members require."""
        required = {name for s in self.space.switches if s.factor.name in on for name in s.requires}
        return frozenset(on | (required & set(self.space.names)))

    def _factorial(self) -> None:
        """Measure a two-level design and fit effects on logarithms; without budget for it the single effects count."""
        names = self.space.names
        if not names:
            return
        design = two_level(names, lambda on: self.space.refusal(on) is None and self._predicted_to_fit(on))
        if self._cost(len(self._new(design))) > 0.6 * self._budget_left():
            self.excluded.append(("interactions", "the budget does not suffice for a factorial design"))
            return
        for on in design.runs:
            self._try(on, "factorial")
        self._fit()

    def _new(self, design: Design) -> list[On]:
        return [on for on in design.runs if on not in self.tried]

    def _fit(self) -> None:
        """Fit the effects through everything that was measured, the baseline and the single ones included."""
        sound = [tried for tried in self.tried.values() if tried.measured and set(tried.on) <= set(self.space.names)]
        runs = [tried.on for tried in sound]
        self.model_time = fit_effects(self.space.names, runs, [tried.seconds for tried in sound])
        self.model_memory = fit_effects(self.space.names, runs, [tried.peak_bytes for tried in sound])

    def _choose(self) -> None:
        """Measure the most promising combinations in turns and take the fastest that fits and is sound."""
        promising = self._promising()
        for repeat in range(REPEATS):
            for on in promising:
                if (repeat == 0 and not self._answers()) or self._budget_left() > self._cost(1):
                    self._try(on, "candidate", repeat)
        measured = self._answers() or self._fitting()
        if not measured:
            raise InputError("No combination of methods that was tried fits into memory and computes what it should.")
        fitting = [tried for tried in measured if tried.on in promising] or measured
        ranked = sorted(self._within_the_budget_of_forgetting(fitting), key=lambda tried: tried.seconds)
        if len(ranked) < 2:  # the budget ended before a second one was tried, but others were for other reasons
            others = [tried for tried in measured if tried not in fitting and not tried.on & self._memory()]
            ranked += sorted(others, key=lambda tried: tried.seconds)
        self._say_what_was_faster_and_forgot(ranked[0])
        self.winner = ranked[0].on
        self.runner_up = ranked[1].on if len(ranked) > 1 else None

    def _fitting(self) -> list[Tried]:
        return [tried for tried in self.tried.values() if tried.is_sound and tried.peak_bytes <= self.limit_bytes]

    def _answers(self) -> list[Tried]:
        """What was measured, fits, is sound and learns the user's problem."""
        return [tried for tried in self._fitting() if self.keeps_what_is_learnt(tried.on)]

    def _within_the_budget_of_forgetting(self, fitting: list[Tried]) -> list[Tried]:
        """Return those that do not already forget too much; where all do, none is worse than another."""
        return [tried for tried in fitting if not tried.forgets_more_than(self.max_forgetting)] or fitting

    def _say_what_was_faster_and_forgot(self, winner: Tried) -> None:
        """Name what would have won by its speed."""
        if winner.forgets_more_than(self.max_forgetting):
            return
        for tried in self.tried.values():
            over = tried.forgets_more_than(self.max_forgetting) and self.keeps_what_is_learnt(tried.on)
            if over and tried.is_sound and tried.seconds < winner.seconds:
                lost, steps = nats_lost(tried), self.warm_up + self.steps
                reason = f"forgets {lost:.3f} nats in {steps} steps, over the budget of {self.max_forgetting:g}"
                self._say_once(self.space.label(tried.on), reason)

    def _promising(self) -> list[On]:
        """Combinations that learn the user's problem, by predicted speed; memory methods only where they are needed."""
        candidates = [on for on in self._combinations() if self.keeps_what_is_learnt(on)]
        scored = [(expected_seconds(self, on), on) for on in candidates if self._expected_to_fit(on)]
        if self.max_forgetting is not None:
            scored = [pair for pair in scored if expected_forgetting(self, pair[1]) <= self.max_forgetting] or scored
        memory = self._memory()
        lean = [(seconds, on) for seconds, on in scored if not on & memory]
        best_lean = min((seconds for seconds, _ in lean), default=math.inf)
        allowed = [
            (seconds, on) for seconds, on in scored if not on & memory or seconds < (1 - CLEARLY_FASTER) * best_lean
        ]
        ordered = [on for _, on in sorted(allowed or scored, key=lambda pair: (pair[0], len(pair[1]), sorted(pair[1])))]
        # The user's own and the fastest that was measured are candidates whatever effects promise of others.
        measured = [on for on in ordered if on in self.tried and self.tried[on].is_sound]
        first = [on for on in (self.own, *measured[:1]) if on in ordered]
        return list(dict.fromkeys([*first, *ordered]))[:FINALISTS]

    def _combinations(self) -> list[On]:
        sets: list[On] = [frozenset()]
        for name in self.space.names:
            sets += [on | {name} for on in sets]
        return [on for on in sets if self.space.refusal(on) is None]

    def keeps_what_is_learnt(self, on: On) -> bool:
        """Say whether the methods that change what is learnt are those of the user's recipe."""
        learning = self._learning()
        return on & learning == self.space.of_base() & learning

    def _expected_to_fit(self, on: On) -> bool:
        if on in self.tried:
            return self.tried[on].peak_bytes <= self.limit_bytes
        return self._predicted_to_fit(on)

    def _ladder(self) -> None:
        """Add the winner's methods one after another, in the order of the space."""
        on: On = frozenset()
        self.ladder = [on]
        for name in self.space.names:
            if name in self.winner:
                on = on | {name}
                if self.space.refusal(on) is None and self._try(on, "ladder") is not None:
                    self.ladder.append(on)

    def _left_out(self) -> None:
        for name in self.space.names:
            rest = self.winner - {name}
            if name in self.winner and self.space.refusal(rest) is None:
                self._try(rest, "left out")

    def _beyond(self) -> None:
        """Measure what products in 8 bits would win: they learn over a coarser base, so the user decides."""
        narrow, winner = self.space.narrow, self.space.recipe(self.winner)
        is_possible = winner.get(LoRA) is not None and winner.get(Quantize) is None
        if narrow is None or not is_possible or "nf4" in self.unwanted:  # what `--without quantize` says here
            return
        if winner.get(SupervisedLoss) is None:
            narrow = narrow.model_copy(update={"head_compute": "dense"})
        recipe = winner.replace(methods=(*(winner.methods or ()), narrow))
        if conflicts(recipe) or self._budget_left() < self._cost(1):
            return
        outcome = self._measure(recipe, f"beyond: {self.space.label(self.winner)} + {NARROW}", self.winner, 0)
        self.beyond = Tried(self.winner, "beyond", (outcome,))

    def _try(self, on: On, role: str, repeat: int = 0) -> Tried | None:
        """Measure a combination, or find it where it was measured; None where the planner says that it cannot fit."""
        known = self.tried.get(on)
        if known is not None and repeat < len(known.outcomes):
            return known
        if role not in NEEDED and self._budget_left() < self._cost(1):
            self._say_once(role, "the budget ended before all of these were tried")
            return None
        if not self._predicted_to_fit(on):
            self.excluded.append((self.space.label(on), "predicted not to fit into memory"))
            return None
        recipe = self.space.recipe(on)
        outcome = self._measure(recipe, f"{role}: {self.space.label(on)}", on, repeat)
        outcomes = (outcome,) if known is None else (*known.outcomes, outcome)
        found = Tried(on, known.role if known else role, outcomes, self._gate(on, recipe, outcome))
        self.tried[on] = found
        return found

    def _measure(self, recipe: Recipe, role: str, on: On, repeat: int) -> Measurement | OutOfMemory | Failed:
        evaluation = recipe.evaluation.model_copy(
            update={"max_documents": min(EVALUATED, recipe.evaluation.max_documents)}
        )
        trial = Trial.of(
            "measure",
            recipe.replace(evaluation=evaluation),
            warm_up=self.warm_up,
            steps=self.steps,
            repeat=repeat,
            measures_forgetting=self.max_forgetting is not None and repeat == 0,
        )
        return self.laboratory.run(
            "methods",
            trial,
            params={name: name in on for name in self.space.names},
            role=role,
            expected_seconds=self._cost(1),
        )

    def _say_once(self, what: str, reason: str) -> None:
        if (what, reason) not in self.excluded:
            self.excluded.append((what, reason))

    def _gate(self, on: On, recipe: object, outcome: Measurement | OutOfMemory | Failed) -> Verdict | None:
        """Compare a combination's first batch with that of the same learning problem in its plain form."""
        reference = self.tried.get(on & self._learning())
        if reference is None or not isinstance(outcome, Measurement) or outcome.gate is None:
            return None
        plain = next((m.gate for m in reference.measured if m.gate is not None), None)
        if plain is None or plain.trainable != outcome.gate.trainable or on == reference.on:
            return None
        is_half = bool(on & {"bf16", "fp16"} or self.space.held & {"bf16", "fp16"})
        return compare(outcome.gate, plain, is_half=is_half)

    def _cost(self, num_trials: int) -> float:
        """Return the expected seconds of so many more trials, from those that have been."""
        account = self.laboratory.spent.get("methods")
        if account is None or not account.num_trials:
            return num_trials * ((self.warm_up + self.steps + 5) * self.step_seconds + 2.0)
        return num_trials * account.seconds / account.num_trials

    def _budget_left(self) -> float:
        account = self.laboratory.spent.get("methods")
        return self.budget_seconds - (account.seconds if account else 0.0)
