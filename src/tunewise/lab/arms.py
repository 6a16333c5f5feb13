"""An arm of the batch study: a batch size and a learning rate trained for so many tokens; and who trains it.

The study speaks of arms only, so that it runs the same on a real model (`RecipeArms`) and on a formula (tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tunewise.lab.findings import Arm
from tunewise.lab.laboratory import Laboratory
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory
from tunewise.lab.trial import Trial
from tunewise.methods import Packing
from tunewise.recipe import BatchSpec, Method, Recipe, TrainingSpec

EVALUATIONS = (1, 2, 4)
"""Points of an arm's loss curve, by round; an evaluation of a short arm costs as much as the arm."""


@dataclass(frozen=True)
class ArmSpec:
    """What an arm is.

    Attributes:
        rung: round of the halving, 0 is the shortest.
        batch_tokens: supervised tokens a step.
        learning_rate: at its peak; it decays to zero within the arm.
        beta2: of Adam's family; None for optimizers without.
        budget_tokens: supervised tokens of the whole arm.
        measures_noise: whether the gradient's noise is taken on the way.
    """

    rung: int
    batch_tokens: int
    learning_rate: float
    beta2: float | None
    seed: int
    budget_tokens: int
    measures_noise: bool = False


@dataclass(frozen=True)
class ArmResult:
    """What became of an arm: the finding, and the measurement when there is one."""

    spec: ArmSpec
    arm: Arm
    measurement: Measurement | None

    @property
    def loss(self) -> float | None:
        """The last validation loss."""
        return self.arm.loss


class Arms(Protocol):
    """Who trains arms."""

    def run(self, spec: ArmSpec) -> ArmResult:
        """Train an arm, or find it where it was trained before."""

    def seconds(self, batch_tokens: int, budget_tokens: int) -> float:
        """Return what an arm is expected to take, start-up and evaluation included."""

    @property
    def spent_seconds(self) -> float:
        """What all arms so far have taken."""


def result_of(spec: ArmSpec, outcome: Measurement | OutOfMemory | Failed) -> ArmResult:
    """Return an arm's result from its trial's outcome."""
    measured = outcome if isinstance(outcome, Measurement) else None
    rate = measured.tokens_per_second if measured else None
    arm = Arm(
        rung=spec.rung,
        batch_tokens=spec.batch_tokens,
        learning_rate=spec.learning_rate,
        beta2=spec.beta2,
        seed=spec.seed,
        budget_tokens=spec.budget_tokens,
        steps=measured.steps if measured else 0,
        loss=measured.loss if measured else None,
        seconds=measured.training_seconds if measured else None,
        tokens_per_second=rate.middle if rate else None,
        curve=measured.curve if measured else (),
        outcome="measured" if measured else _describe(outcome),
    )
    return ArmResult(spec, arm, measured)


def _describe(outcome: Measurement | OutOfMemory | Failed) -> str:
    if isinstance(outcome, OutOfMemory):
        return "out of memory"
    return outcome.reason if isinstance(outcome, Failed) else "measured"


@dataclass
class RecipeArms:
    """Trains arms of a real recipe in a laboratory.

    Attributes:
        base: the complete recipe that the arms vary.
        step_seconds: from the supervised tokens of a step to its seconds, from measured throughput.
        overhead_seconds: start-up and evaluation of a trial.
        max_documents: validation documents, the same ones for every arm.
        noise_documents: documents of a micro-batch where the noise is measured; such an arm is not packed, so that a
            step has several micro-batches.
    """

    laboratory: Laboratory
    base: Recipe
    step_seconds: Callable[[int], float]
    overhead_seconds: float
    noise_documents: int = 1
    max_documents: int = 500

    def run(self, spec: ArmSpec) -> ArmResult:
        """Train an arm in a trial of its own."""
        recipe = arm_recipe(self.base, spec, self.noise_documents)
        evaluation = recipe.evaluation.model_copy(update={"max_documents": self.max_documents})
        trial = Trial.of(
            "learn",
            recipe.replace(evaluation=evaluation),
            evaluations=EVALUATIONS[spec.rung],
            measures_noise=spec.measures_noise,
            noise_examples=4 if spec.measures_noise else 0,
        )
        outcome = self.laboratory.run(
            "batch size",
            trial,
            params={
                "batch_tokens": spec.batch_tokens,
                "learning_rate": spec.learning_rate,
                "budget_tokens": spec.budget_tokens,
                "seed": spec.seed,
            },
            role=f"batch {spec.batch_tokens} tokens, learning rate {spec.learning_rate:.2g}, round {spec.rung + 1}",
            expected_seconds=self._planned(spec.batch_tokens, spec.budget_tokens),
        )
        return result_of(spec, outcome)

    def seconds(self, batch_tokens: int, budget_tokens: int) -> float:
        """Return what the arm was planned to take, at the pace of the arms so far."""
        return self.laboratory.pace("batch size") * self._planned(batch_tokens, budget_tokens)

    def _planned(self, batch_tokens: int, budget_tokens: int) -> float:
        """Return the seconds of the steps, and what a trial costs besides."""
        return max(1.0, budget_tokens / batch_tokens) * self.step_seconds(batch_tokens) + self.overhead_seconds

    @property
    def spent_seconds(self) -> float:
        """What the laboratory has spent on arms."""
        account = self.laboratory.spent.get("batch size")
        return account.seconds if account else 0.0


def arm_recipe(base: Recipe, spec: ArmSpec, noise_documents: int = 1) -> Recipe:
    """Return the recipe of an arm: its batch, rate, half-life and length; the rate decays to zero in each arm."""
    schedule = base.training.schedule if base.training.schedule in ("cosine", "linear", "wsd") else "linear"
    training = TrainingSpec(
        **{
            **base.training.model_dump(),
            "epochs": None,
            "steps": None,
            "tokens": spec.budget_tokens,
            "learning_rate": float(f"{spec.learning_rate:.4g}"),
            "schedule": schedule,
            "final_learning_rate": 0.0,
        }
    )
    size, methods = base.batch.micro_batch_size, base.methods or ()
    if spec.measures_noise:
        size, methods = noise_documents, tuple(method for method in methods if not isinstance(method, Packing))
    return base.replace(
        batch=BatchSpec(supervised_tokens=spec.batch_tokens, micro_batch_size=size),
        training=training,
        methods=with_beta2(methods, spec.beta2),
        seed=spec.seed,
    )


def with_beta2(methods: tuple[Method, ...], beta2: float | None) -> tuple[Method, ...]:
    """Return the methods with the optimizer's beta2 replaced, where it has one."""
    if beta2 is None:
        return methods
    return tuple(m.model_copy(update={"beta2": beta2}) if hasattr(m, "beta2") else m for m in methods)


def beta2_of(methods: tuple[Method, ...]) -> float | None:
    """Return the optimizer's beta2, None for optimizers without."""
    return next((float(value) for method in methods if (value := getattr(method, "beta2", None)) is not None), None)


def half_life_kept(beta2: float | None, factor: float) -> float | None:
    """Return beta2 ** factor: the same half-life in tokens at a batch `factor` times as large.

    Marek et al. 2025, arXiv 2507.07101.
    """
    return None if beta2 is None else float(f"{beta2**factor:.6g}")
