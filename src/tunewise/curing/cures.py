"""The cures that a recipe allows, each as a recipe of its own, and what each is expected to cost.

References (methods.md, part C): factors on the change are WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903) and
LM-Cocktail (Xiao et al. 2023, 2311.13534); early stopping by a budget, lower rates and ranks Biderman et al. 2024
(2405.09673) and Kalajdzievski 2024 (2401.05605); 1 % of replay Bethune et al. (ICML 2025); KL to the base "RL's Razor"
(Shenfeld et al. 2025, 2509.04259).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunewise.methods.compatibility import conflicts
from tunewise.methods.lora import LoRA
from tunewise.methods.low_rank import ALL_LINEAR
from tunewise.methods.retention import KLToBase
from tunewise.quality.verdict import QualityReport
from tunewise.recipe import EvaluationSpec, Recipe, ReplaySpec, Slot, TrainingSpec

AFTERWARDS = "afterwards"
"""Name of the cure that trains nothing: the factor of the change, and the average of checkpoints."""

RATE_SHARE = 1 / 3
RANK_SHARE = 4
FRACTIONS = (0.01, 0.05, 0.25)
BETA = 0.1
STOPPING_EVALUATIONS = 12
"""How often a training looks whether it must stop."""

STOPPING_DOCUMENTS = 128
STOPPING_TOKENS = 4096

GATE_COST = 1.12
"""What judging adds to a training: `quality.share`, by default."""

EARLY_COST = 0.7
"""Of a training, what one is expected to take that ends at its forgetting budget."""

KL_COST = 1.4
"""A forward pass more, of the three that forward and backward are."""

GENERATION_COST = 4 / 3
"""What generating a token takes, in tokens of training (`quality.material.GENERATED_COST` forward passes)."""

_MENDABLE = ("forgetting", "battery", "contract", "overfitting", "best state", "false refusals")


@dataclass(frozen=True)
class Cure:
    """One thing to be tried.

    Attributes:
        name: short, also of its folder.
        label: in words.
        cost: expected, in trainings of the uncured recipe; 0 where nothing is trained.
        recipe: what is trained; None where nothing is.
    """

    name: str
    label: str
    cost: float
    recipe: Recipe | None = None


def unmendable(report: QualityReport) -> tuple[str, ...]:
    """Return the failed checks that no cure mends: leaks, a template, endings are faults of data or of set-up.

    A gain that is not there is mended only where training went past it: what learns less then gains more.
    """
    names = []
    for check in report.checks:
        if check.status != "failed" or check.name.startswith(_MENDABLE):
            continue
        if check.name == "task gain" and check.measured is not None and check.measured.high < 0.0:
            continue
        names.append(check.name)
    return tuple(names)


def cures_of(recipe: Recipe, num_steps: int) -> tuple[Cure, ...]:
    """Return the cures of a complete recipe, cheapest first; costs that differ by less than a tenth count as equal.

    Args:
        recipe: that of the model which was refused.
        num_steps: of its training.
    """
    is_trained = recipe.model.weights == "pretrained" and recipe.objective != "pretrain"
    found = [Cure(AFTERWARDS, "less of the change, averages", 0.0), _stopped(recipe, num_steps, is_trained)]
    found += [_slower(recipe)]
    if is_trained:
        found += [_replayed(recipe, fraction) for fraction in FRACTIONS if fraction > _replays(recipe)]
        found += _near_the_base(recipe)
    found += _smaller(recipe)
    possible = [cure for cure in found if cure.recipe is None or not conflicts(cure.recipe)]
    return tuple(sorted(possible, key=lambda cure: round(cure.cost, 1)))


def _stopped(recipe: Recipe, num_steps: int, is_trained: bool) -> Cure:
    spec, quality = recipe.evaluation, recipe.quality
    changes: dict[str, int | float | str] = {
        "every": max(1, num_steps // STOPPING_EVALUATIONS),
        "keep_best": True,
        "max_documents": min(spec.max_documents, STOPPING_DOCUMENTS),
    }
    if is_trained:
        budget = quality.max_forgetting if spec.forgetting_budget is None else spec.forgetting_budget / 2
        changes |= {
            "general_text": quality.general_text or spec.general_text or "default",
            "general_tokens": min(spec.general_tokens, STOPPING_TOKENS),
            "forgetting_budget": budget,
        }
    label = "early stopping by the forgetting budget" if is_trained else "the best state on the way"
    evaluation = EvaluationSpec.model_validate({**spec.model_dump(), **changes})
    return Cure("early-stop", label, EARLY_COST, recipe.replace(evaluation=evaluation))


def _slower(recipe: Recipe) -> Cure:
    rate = (recipe.training.learning_rate or 0.0) * RATE_SHARE
    training = recipe.training.model_copy(update={"learning_rate": float(f"{rate:.3g}")})
    return Cure("rate-third", "a third of the learning rate", 1.0, recipe.replace(training=training))


def _replays(recipe: Recipe) -> float:
    return recipe.data.replay.fraction if recipe.data.replay is not None else 0.0


def _replayed(recipe: Recipe, fraction: float) -> Cure:
    """Mix general text in, at the same number of the task's own tokens.

    What the gate measures must not be replayed: its own text is used whole, so a user's is replaced by what the base
    says itself; the default's two parts never meet.
    """
    present, quality = recipe.data.replay, recipe.quality
    source = present.source if present is not None else "default" if quality.general_text is None else "self"
    data = recipe.data.model_copy(update={"replay": ReplaySpec(fraction=fraction, source=source)})
    growth = (1 - _replays(recipe)) / (1 - fraction)
    cost = growth + (fraction * growth * GENERATION_COST if source == "self" else 0.0)
    training = recipe.training.model_dump()
    for name in ("steps", "tokens"):
        if training[name] is not None:
            training[name] = math.ceil(training[name] * growth)
    text = "text of the base's own" if source == "self" else "general text"
    return Cure(
        f"replay-{fraction:.0%}".rstrip("%"),
        f"replay of {fraction:.0%} {text}",
        cost,
        recipe.replace(data=data, training=TrainingSpec(**training)),
    )


def _near_the_base(recipe: Recipe) -> list[Cure]:
    lora = recipe.get(LoRA)
    if lora is None or recipe.get(KLToBase) is not None:
        return []
    kept = tuple(method for method in recipe.methods or () if method.slot != Slot.LOSS)
    return [
        Cure("kl", f"KL to the base, weight {BETA:g}", KL_COST, recipe.replace(methods=(*kept, KLToBase(beta=BETA))))
    ]


def _smaller(recipe: Recipe) -> list[Cure]:
    lora = recipe.get(LoRA)
    if lora is None:
        return []
    others = tuple(method for method in recipe.methods or () if method is not lora)
    found = []
    if lora.rank >= 2 * RANK_SHARE:
        alpha = None if lora.alpha is None else lora.alpha / RANK_SHARE
        rank = lora.rank // RANK_SHARE
        smaller = lora.model_copy(update={"rank": rank, "alpha": alpha})
        found.append(Cure(f"rank-{rank}", f"LoRA of rank {rank}", 1.0, recipe.replace(methods=(*others, smaller))))
    if lora.target_modules == ALL_LINEAR:
        fewer = lora.model_copy(update={"target_modules": ("q_proj", "v_proj")})
        found.append(Cure("fewer-targets", "LoRA on queries and values", 1.0, recipe.replace(methods=(*others, fewer))))
    return found
