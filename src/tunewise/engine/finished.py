"""A finished run opened again: its recipe, its data, and the state that counts in a run that can be computed with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.averaging import average
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.scaling import WeightLine
from tunewise.engine.state import restore_trainable
from tunewise.errors import InputError
from tunewise.methods.method import Run
from tunewise.methods.reading import load_recipe
from tunewise.workload.model import model_fingerprint


@dataclass(frozen=True, eq=False)
class Finished:
    """A run with its trained values.

    Attributes:
        plan: its complete recipe and data.
        run: ready to compute with.
        line: from its base to the trained values; None where nobody asked for it.
        lost: of an average, the largest share of an update that its rank could not hold.
    """

    plan: Plan
    run: Run
    line: WeightLine | None
    lost: float


def open_finished(
    folder: str | Path, doing: str, *, last: int = 1, others: tuple[str | Path, ...] = (), with_line: bool = False
) -> Finished:
    """Build the run of a folder and put the state that counts into it, or an average of several.

    Args:
        folder: of the run.
        doing: what for, in the words of an error ("exported").
        last: average the run's newest so many checkpoints instead of taking the state that counts.
        others: average with the states that count of these runs.
        with_line: whether the run will be scaled.

    Raises:
        InputError: there is no run, it has no checkpoint (or not so many), or its recipe or model changed.
        CheckpointError, Conflict: the states cannot be averaged; the run cannot be scaled.
    """
    home = RunFolder(Path(folder))
    if not home.recipe_file.is_file():
        raise InputError(f"There is no run in '{folder}': it has no recipe.yaml.")
    recipe = load_recipe(home.recipe_file)
    states = [result_tensors(home, recipe.evaluation.keep_best)] if last == 1 else _newest(home, last)
    for other in others:
        theirs = RunFolder(Path(other))
        if not theirs.recipe_file.is_file():
            raise InputError(f"There is no run in '{other}': it has no recipe.yaml.")
        if theirs.fingerprints().get("model") != home.fingerprints().get("model"):
            raise InputError(f"'{other}' was trained from another base model than '{folder}'; they have no average.")
        states.append(result_tensors(theirs, load_recipe(theirs.recipe_file).evaluation.keep_best))
    plan = settle(recipe)
    refuse_changes(plan, home, ("recipe", "model"), f"The run in '{folder}' cannot be {doing}")
    run = assemble(plan)
    line = WeightLine(run) if with_line else None
    if len(states) == 1:
        restore_trainable(run, states[0])
        lost = 0.0
    else:
        lost = average(run, states)
    if line is not None:
        line.reached()
    return Finished(plan, run, line, lost)


def result_tensors(home: RunFolder, keep_best: bool) -> dict[str, Any]:
    """Read the state that counts: the best one where the recipe keeps it, else the last one."""
    checkpoints = list_checkpoints(home.checkpoints)
    if not checkpoints:
        raise InputError(f"The run in '{home.path}' has no checkpoint to take trained values from.")
    tensors, state = load_checkpoint(checkpoints[-1][1])
    best = state["progress"]["best_step"]
    kept = dict(checkpoints)
    return load_checkpoint(kept[best])[0] if keep_best and best in kept else tensors


def _newest(home: RunFolder, count: int) -> list[dict[str, Any]]:
    checkpoints = list_checkpoints(home.checkpoints)
    if len(checkpoints) < count:
        raise InputError(
            f"The run in '{home.path}' has kept {len(checkpoints)} checkpoints, fewer than {count}. Train with "
            f"checkpoints.keep: {count}."
        )
    return [load_checkpoint(path)[0] for _, path in checkpoints[-count:]]


def refuse_changes(plan: Plan, home: RunFolder, names: tuple[str, ...], refused: str) -> None:
    """Raise InputError when one of recipe, data and model is not what the run was started with."""
    known, present = home.fingerprints(), fingerprints_of(plan)
    for name in names:
        if known.get(name) != present[name]:
            raise InputError(
                f"{refused}: {_CHANGED[name]} changed since it was started. Undo the change, or start a new run."
            )


_CHANGED = {"data": "the data", "recipe": "the recipe", "model": "the model"}


def fingerprints_of(plan: Plan) -> dict[str, str]:
    """Return what a run folder remembers of recipe, data and model, and what was replayed in words."""
    return {
        "recipe": plan.recipe.id,
        "data": plan.data.data_fingerprint,
        "model": model_fingerprint(plan.recipe.model),
        **({"replay": plan.data.replayed} if plan.data.replayed else {}),
    }
