"""The main line from Python: `train(recipe)`, `resume(folder)`, `export_merged` and `export_rank`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.state import restore_trainable
from tunewise.engine.train import Observe, Training
from tunewise.errors import InputError
from tunewise.evaluation import Judge, write_report
from tunewise.export.finish import Saved, cut_run, save_cut, save_merged, save_result
from tunewise.export.result import Result
from tunewise.methods.method import Run
from tunewise.methods.reading import load_recipe, recipe_from_mapping
from tunewise.planner.calibration import learn_from_run
from tunewise.recipe import Recipe
from tunewise.report.trackers import open_trackers
from tunewise.workload.model import model_fingerprint

Announce = Callable[[Plan, Path], None]


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    observe: Observe = lambda entry: None,
    announce: Announce = lambda plan, folder: None,
) -> Result:
    """Train as `recipe` says, save the result in a new run folder and judge it (`Result.quality`).

    Args:
        recipe: a Recipe, plain data in its form, or the path of a YAML file.
        out: the run folder; default `recipe.out`, else a new folder under `runs/`.
        observe: called with every line that goes to `metrics.jsonl`.
        announce: called once, before weights are loaded, with what is going to be done.

    Raises:
        InputError, Conflict, MissingBackend: before anything is trained.
        DoesNotFit, TrainingDiverged, StorageError: while training; what was saved stays.
        VerificationError: the saved result differs from the trained one.
    """
    recipe = as_recipe(recipe)
    plan = settle(recipe)
    wanted = out or recipe.out
    folder = _new_folder(Path(wanted) if wanted else None, recipe)
    announce(plan, folder.path)
    folder.open()
    try:
        with open_trackers(plan.recipe, folder.path) as track:
            run = assemble(plan)  # before recipe.yaml is written: what fails here is no run that could be resumed
            folder.write_start(plan.recipe, _fingerprints(plan))
            result = _run(run, plan, folder, _both(track, observe), resume_it=False)
            learn_from_run(recipe.id, folder.path / "metrics.jsonl")
            return result
    finally:
        folder.close()


def resume(
    folder: str | Path,
    *,
    observe: Observe = lambda entry: None,
    announce: Announce = lambda plan, folder: None,
) -> Result:
    """Go on with an interrupted run, bit for bit as if it had never stopped.

    Raises:
        InputError: there is no run, or its data or model changed since.
        CheckpointError: no checkpoint is intact.
    """
    home = RunFolder(Path(folder))
    if not home.recipe_file.is_file():
        raise InputError(f"There is no run to resume in '{folder}': it has no recipe.yaml.")
    home.open()
    try:
        plan = settle(load_recipe(home.recipe_file))
        _refuse_changes(plan, home, ("recipe", "data", "model"), f"The run in '{folder}' cannot go on")
        announce(plan, home.path)
        with open_trackers(plan.recipe, home.path) as track:
            begun = bool(list_checkpoints(home.checkpoints))
            return _run(assemble(plan), plan, home, _both(track, observe), resume_it=begun)
    finally:
        home.close()


def export_merged(folder: str | Path, destination: str | Path, *, rank: int | None = None) -> Saved:
    """Merge a finished run's adapter into its base and save one model, read again and compared.

    Args:
        folder: the run.
        destination: a new folder.
        rank: of what 'dylora' trained, how many ranks; None: all of the adapter.

    Raises:
        InputError: there is no run, it has no checkpoint, or the destination is not empty.
        VerificationError: the saved model's logits differ from the trained one's.
    """
    run, plan = _trained(folder, Path(destination))
    if rank is not None:
        cut_run(run, rank)
    return save_merged(run, plan.tokenizer, Path(destination))


def export_rank(folder: str | Path, rank: int, destination: str | Path | None = None) -> Saved:
    """Save the first `rank` ranks of a finished DyLoRA run as an ordinary PEFT LoRA adapter, read again and compared.

    Args:
        folder: the run.
        rank: how many ranks.
        destination: a new folder; None: `adapter-rank-R` in the run's.

    Raises:
        InputError: as `export_merged`, or the run has no such rank.
        VerificationError: the saved adapter's logits differ from the trained one's.
    """
    target = Path(destination) if destination is not None else Path(folder) / f"adapter-rank-{rank}"
    run, plan = _trained(folder, target)
    return save_cut(run, rank, plan.tokenizer, target)


def _trained(folder: str | Path, target: Path) -> tuple[Run, Plan]:
    """Return a finished run as its training left it, once it is sure that `target` is free."""
    home = RunFolder(Path(folder))
    if not home.recipe_file.is_file():
        raise InputError(f"There is no run in '{folder}': it has no recipe.yaml.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"The destination '{target}' is not empty; name a new folder.")
    recipe = load_recipe(home.recipe_file)
    tensors = _result_tensors(home, recipe.evaluation.keep_best)
    plan = settle(recipe)
    _refuse_changes(plan, home, ("recipe", "model"), f"The run in '{folder}' cannot be exported")
    run = assemble(plan)
    restore_trainable(run, tensors)
    return run, plan


def _run(run: Run, plan: Plan, folder: RunFolder, observe: Observe, *, resume_it: bool) -> Result:
    judge = Judge(plan, run) if plan.recipe.quality.gate else None  # now, while the run is still the base
    training = Training(run, plan.data.train, plan.data.validation, plan.num_steps, folder, observe)
    if resume_it:
        training.resume()
    for note in run.notes:
        training.record({"event": "note", "message": note})
    outcome = training.run()
    saved = save_result(run, plan.tokenizer, folder.path)
    training.record(
        {"event": "saved", "kind": saved.kind, "path": str(saved.folder), "max_difference": saved.max_difference}
    )
    report = None
    if judge is not None:
        report = judge.verdict(run, folder.path / "metrics.jsonl", plan.tokenizer, outcome.seconds)
        write_report(report, folder.path)
        training.record(
            {"event": "quality", "passed": report.passed, "reasons": report.reasons, "seconds": report.seconds}
        )
    training.record({"event": "finished", **asdict(outcome)})
    return Result(plan.recipe, outcome, folder.path, saved, report)


def _refuse_changes(plan: Plan, home: RunFolder, names: tuple[str, ...], refused: str) -> None:
    """Raise InputError when one of recipe, data and model is not what the run was started with."""
    known, present = home.fingerprints(), _fingerprints(plan)
    for name in names:
        if known.get(name) != present[name]:
            raise InputError(
                f"{refused}: {_CHANGED[name]} changed since it was started. Undo the change, or start a new run."
            )


def _both(first: Observe, second: Observe) -> Observe:
    def observe(entry: dict[str, Any]) -> None:
        first(entry)
        second(entry)

    return observe


def _result_tensors(home: RunFolder, keep_best: bool) -> dict[str, Any]:
    """Read the state that counts: the best one where the recipe keeps it, else the last one."""
    checkpoints = list_checkpoints(home.checkpoints)
    if not checkpoints:
        raise InputError(f"The run in '{home.path}' has no checkpoint to export.")
    tensors, state = load_checkpoint(checkpoints[-1][1])
    best = state["progress"]["best_step"]
    kept = dict(checkpoints)
    return load_checkpoint(kept[best])[0] if keep_best and best in kept else tensors


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Return the recipe that a value, plain data or a YAML file's path stands for."""
    if isinstance(recipe, Recipe):
        return recipe
    return recipe_from_mapping(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)


def _new_folder(wanted: Path | None, recipe: Recipe) -> RunFolder:
    if wanted is not None:
        if (wanted / "recipe.yaml").exists():
            raise InputError(
                f"'{wanted}' already holds a run. Continue it with: tunewise train --resume {wanted} ; "
                "or name another folder with --out."
            )
        if wanted.exists() and not wanted.is_dir():
            raise InputError(f"'{wanted}' is a file; name a folder with --out.")
        return RunFolder(wanted)
    stem = Path(recipe.data.source).name.split(".")[0] or "run"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return RunFolder(next(path for name in names if not (path := Path("runs") / name).exists()))


_CHANGED = {"data": "the data", "recipe": "the recipe", "model": "the model"}


def _fingerprints(plan: Plan) -> dict[str, str]:
    return {
        "recipe": plan.recipe.id,
        "data": plan.data.data_fingerprint,
        "model": model_fingerprint(plan.recipe.model),
    }
