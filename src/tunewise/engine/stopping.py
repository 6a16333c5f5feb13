"""When a training ends, and what the state that it keeps has forgotten: rules over its progress, nothing else."""

from __future__ import annotations

from tunewise.engine.state import Progress
from tunewise.recipe import EvaluationSpec


def reason_to_finish(progress: Progress, spec: EvaluationSpec, num_steps: int) -> str | None:
    """Return why a training ends now, in words, or None while it goes on.

    Args:
        progress: with its newest evaluation.
        spec: the recipe's patience and its budget of forgetting.
        num_steps: of the whole training.
    """
    if progress.step >= num_steps:
        return "all steps done"
    if spec.patience is not None and progress.evaluations_since_best >= spec.patience:
        return f"no better validation loss for {spec.patience} evaluations"
    return None if is_within_budget(progress, spec) else _over_budget(progress, spec)


def is_within_budget(progress: Progress, spec: EvaluationSpec) -> bool:
    """Say whether the newest evaluation keeps to the budget of forgetting; without one of the two it does."""
    budget, forgetting = spec.forgetting_budget, progress.forgetting
    return budget is None or forgetting is None or forgetting <= budget


def forgetting_of_what_is_kept(progress: Progress, spec: EvaluationSpec) -> float | None:
    """Return what the state that is kept has forgotten, nats per token; None where that was not measured."""
    if not spec.keep_best or None in (progress.best_general_loss, progress.best_step):
        return progress.forgetting
    assert progress.best_general_loss is not None
    assert progress.first_general_loss is not None
    return progress.best_general_loss - progress.first_general_loss


def _over_budget(progress: Progress, spec: EvaluationSpec) -> str:
    said = (
        f"forgetting of {progress.forgetting:.3f} nats after step {progress.step}, over the budget of "
        f"{spec.forgetting_budget:g}"
    )
    if progress.best_step is None:
        said += "; no evaluation was within it, so what is kept is over it too: evaluate more often, or replay"
    return said
