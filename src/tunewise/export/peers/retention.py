"""What a recipe does against forgetting and made-up answers, which no other tool has: named, and left out.

How a result is judged (`quality`) is left out without a word: it changes nothing about what is trained.
"""

from __future__ import annotations

from tunewise.export.peers.config import Missing, shown
from tunewise.export.peers.ledger import Ledger
from tunewise.methods import L2SP, KLToBase, SupervisedLoss
from tunewise.recipe import EvaluationSpec, Method, QualitySpec, Recipe

_EVALUATION = ("general_text", "general_tokens", "forgetting_budget")


def ledger_without_retention(recipe: Recipe, peer: str) -> tuple[Ledger, Recipe]:
    """Return the recipe without what keeps a model near its base, and a ledger of it that names what was left out."""
    methods, missing = [], []
    for method in recipe.methods or ():
        near = _near(method)
        if near is not method:
            missing.append(Missing(method.name, shown(method.model_dump(mode="json")), f"{peer} has nothing like it"))
        if near is not None:
            methods.append(near)
    if recipe.data.replay is not None:
        reason = f"{peer} mixes no general text in; put some into the data file"
        missing.append(Missing("data.replay", shown(recipe.data.replay.model_dump()), reason))
    if recipe.data.abstain is not None:
        reason = f"{peer} asks the base nothing; change the answers in the data file"
        missing.append(Missing("data.abstain", shown(recipe.data.abstain.model_dump()), reason))
    for field in ("general_text", "forgetting_budget"):
        if (value := getattr(recipe.evaluation, field)) is not None:
            missing.append(Missing(f"evaluation.{field}", shown(value), f"{peer} measures no forgetting"))
    kept = {name: value for name, value in recipe.evaluation.model_dump().items() if name not in _EVALUATION}
    written = recipe.replace(
        methods=tuple(methods),
        data=recipe.data.model_copy(update={"replay": None, "abstain": None}),
        evaluation=EvaluationSpec(**kept),
    )
    ledger = Ledger(written, peer)
    ledger.missing += missing
    judging = (f"quality.{field}" for field in QualitySpec.model_fields)  # changes nothing about what is trained
    for setting in ("data.replay", "data.abstain", *(f"evaluation.{field}" for field in _EVALUATION), *judging):
        ledger.without_effect(setting)
    return ledger, written


def _near(method: Method) -> Method | None:
    """Return what comes nearest to a method in a tool that keeps nothing near a base; most are kept as they are."""
    if isinstance(method, L2SP):
        return None
    return SupervisedLoss(chunk_tokens=method.chunk_tokens) if isinstance(method, KLToBase) else method
