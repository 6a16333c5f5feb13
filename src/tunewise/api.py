"""The main line from Python: `train(recipe)`, `resume(folder)`, and what can be done with a finished run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.checkpoint import list_checkpoints
from tunewise.engine.finished import fingerprints_of, refuse_changes
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.train import Observe, Training
from tunewise.errors import InputError
from tunewise.evaluation import Judge, write_report
from tunewise.export.afterwards import export_adapter, export_merged, export_rank, sweep_scale
from tunewise.export.finish import save_result
from tunewise.export.result import Result
from tunewise.methods.method import Run
from tunewise.methods.reading import load_recipe, recipe_from_mapping
from tunewise.planner.calibration import learn_from_run
from tunewise.recipe import Recipe
from tunewise.report.trackers import open_trackers

__all__ = ["as_recipe", "export_adapter", "export_merged", "export_rank", "resume", "sweep_scale", "train"]

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
            folder.write_start(plan.recipe, fingerprints_of(plan))
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
        refuse_changes(plan, home, ("recipe", "data", "model"), f"The run in '{folder}' cannot go on")
        announce(plan, home.path)
        with open_trackers(plan.recipe, home.path) as track:
            begun = bool(list_checkpoints(home.checkpoints))
            return _run(assemble(plan), plan, home, _both(track, observe), resume_it=begun)
    finally:
        home.close()


def _run(run: Run, plan: Plan, folder: RunFolder, observe: Observe, *, resume_it: bool) -> Result:
    judge = Judge(plan, run) if plan.recipe.quality.gate else None  # now, while the run is still the base
    data = plan.data
    training = Training(run, data.train, data.validation, plan.num_steps, folder, observe, general=data.general)
    if resume_it:
        training.resume()
    for note in (*([data.replayed] if data.replayed else []), *run.notes):
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


def _both(first: Observe, second: Observe) -> Observe:
    def observe(entry: dict[str, Any]) -> None:
        first(entry)
        second(entry)

    return observe


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
