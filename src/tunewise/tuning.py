"""`tune(recipe)`: find the batch size, then the methods, confirm, train, report; each study can be had alone.

RUN/
  findings.json, report.html    what was found
  best.yaml                     the recipe that was found: tunewise train RUN/best.yaml
  training/                     the final training, a run folder like any other
  cures/                        where the gate refused its model: what was tried on it (see curing/mend.py)
  study.db                      all trials, an Optuna storage (optuna-dashboard sqlite:///RUN/study.db)
  trials/                       a log a trial
  tuning.json, data/, machine.yaml
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunewise.api import as_recipe, resume, train
from tunewise.curing.finished import finished_result
from tunewise.curing.mend import STUDY, mend
from tunewise.engine.checkpoint import storage_errors
from tunewise.engine.run_folder import read_metrics, versions, write_whole
from tunewise.export.result import Result
from tunewise.lab.cure_findings import CureFindings
from tunewise.lab.elsewhere import elsewhere
from tunewise.lab.findings import Findings, TrainingResult
from tunewise.lab.headline import headline
from tunewise.lab.outcome import Interval, Point
from tunewise.lab.tuning import BATCH_SHARE, CONFIRM_SHARE, METHODS_SHARE, Options, Tuning
from tunewise.methods.reading import recipe_to_yaml
from tunewise.recipe import Recipe
from tunewise.report.findings_file import FINDINGS_FILE, REPORT_FILE
from tunewise.report.html import write_report

Part = Literal["all", "batch", "methods"]
BEST = "best.yaml"

CURES_WITHOUT_BUDGET = 2.0
"""Trainings that cures may take together where the user gave no budget."""

SHARES: dict[Part, dict[str, float]] = {
    "all": {"batch": BATCH_SHARE, "methods": METHODS_SHARE, "confirm": CONFIRM_SHARE},
    "batch": {"batch": 1.0},
    "methods": {"methods": 1.0},
}
"""What part of the search each study may spend."""


@dataclass(frozen=True)
class Watch:
    """Who watches a tuning.

    Attributes:
        part: called with the name of each part as it begins, and the seconds that the search may take.
        trial: called before and after each trial with what is tried and the seconds spent so far.
        training: called with every event of the final training.
    """

    part: Callable[[str, float], None] = lambda name, seconds: None
    trial: Callable[[str, float], None] = lambda what, seconds: None
    training: Callable[[dict[str, Any]], None] = lambda entry: None


@dataclass(frozen=True)
class Tuned:
    """What a tuning came to.

    Attributes:
        recipe: the recipe that was found.
        findings: everything that was found.
        folder: where it is.
        training: the final training, or the cure of its model where the gate refused that one and a cure passes; None
            for a study alone.
    """

    recipe: Recipe
    findings: Findings
    folder: Path
    training: Result | None


def tune(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    folder: str | Path | None = None,
    options: Options | None = None,
    *,
    part: Part = "all",
    watch: Watch | None = None,
) -> Tuned:
    """Find the cheapest way to train `recipe` well and, for part "all", train so.

    The same call continues what an earlier one began: finished trials are not run again.

    Args:
        recipe: where the search starts: a Recipe, plain data in its form, or the path of a YAML file.
        folder: of the tuning; None: a new one under runs/.
        options: budget, memory, wishes.
        part: the whole procedure, or one study.
        watch: who is told what happens.

    Raises:
        InputError, Conflict, MissingBackend: before anything is tried.
        DoesNotFit: the recipe cannot run on this machine as it is.
        StorageError: a trial cannot be kept; earlier ones are.
        KeyboardInterrupt: the user stopped it; finished trials are kept, and what is known is written.
    """
    watch = watch or Watch()
    recipe = as_recipe(recipe)
    folder = Path(folder) if folder is not None else new_folder(Path(recipe.data.source).name.split(".")[0])
    tuning = Tuning(recipe, options or Options(), folder, watch.trial, trains_at_the_end=part == "all")
    try:
        tuning.open()
        outcome = "complete"
        try:
            _search(tuning, part, watch)
        except BaseException as error:  # also the user's interrupt: it is written into the report, then it goes on
            outcome = "stopped by the user" if isinstance(error, KeyboardInterrupt) else f"ended early: {error}"
            raise
        finally:
            if tuning.has_begun:
                _write(tuning, None, outcome)
    finally:
        tuning.close()
    best, cures = tuning.best_recipe(), None
    result = _train(tuning, best, watch) if part == "all" else None
    if result is not None and result.quality is not None and not result.quality.passed:
        _write(tuning, result, "the gate refused the model, and its cures have not been tried to the end")
        best, result, cures = _mend(tuning, best, result, watch)
    findings = _write(tuning, result, "complete", best, cures)
    return Tuned(best, findings, folder, result)


def new_folder(stem: str) -> Path:
    """Return a folder under runs/ that does not exist yet."""
    names = itertools.chain([f"tune-{stem}"], (f"tune-{stem}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := Path("runs") / name).exists())


def _search(tuning: Tuning, part: Part, watch: Watch) -> None:
    """The procedure, in its order."""
    watch.part("throughput", 0.0)
    tuning.measure_throughput()
    seconds = tuning.search_seconds()
    shares = SHARES[part]
    if "batch" in shares:
        watch.part("batch size", seconds)
        tuning.study_batch(shares["batch"] * seconds)
    if "methods" in shares:
        watch.part("methods", seconds)
        tuning.study_methods(shares["methods"] * seconds)
    if "confirm" in shares:
        watch.part("confirmation", seconds)
        tuning.confirm(shares["confirm"] * seconds)


def _train(tuning: Tuning, best: Recipe, watch: Watch) -> Result:
    """Train with what was found, in a run folder inside the tuning's."""
    watch.part("training", tuning.run_seconds(best.batch.supervised_tokens or 1))
    home = tuning.folder / "training"
    if (home / "recipe.yaml").exists():  # a tuning that was stopped while it trained, or later
        return finished_result(home) or resume(home, observe=watch.training)
    return train(best, out=home, observe=watch.training)


def _mend(tuning: Tuning, best: Recipe, uncured: Result, watch: Watch) -> tuple[Recipe, Result, CureFindings]:
    """Try cures on a refused model with what is left of the budget; return the recipe and the model that result."""
    budget, laboratory = tuning.options.budget_seconds, tuning.laboratory
    training = uncured.outcome.seconds

    def left() -> float:
        if budget is not None:
            return budget - training - laboratory.spent_seconds
        spent = laboratory.spent.get(STUDY)
        return CURES_WITHOUT_BUDGET * training - (spent.seconds if spent is not None else 0.0)

    watch.part("cures", 0.0)
    try:
        result, cures = mend(uncured, laboratory, tuning.folder, left)
    finally:
        tuning.close()
    chosen = cures.chosen_point
    trained_anew = chosen is not None and chosen.kind == "training"
    return result.recipe if trained_anew else best, result, cures


def _write(
    tuning: Tuning,
    result: Result | None,
    outcome: str,
    best: Recipe | None = None,
    cures: CureFindings | None = None,
) -> Findings:
    """Write what is known: the recipe, the findings and the report."""
    best = best or tuning.best_recipe()
    findings = _findings(tuning, best, result, outcome, cures)
    with storage_errors(f"cannot write to the tuning's folder {tuning.folder}"):
        write_whole(tuning.folder / BEST, findings.recipe_yaml)
        write_whole(tuning.folder / FINDINGS_FILE, findings.model_dump_json(indent=1))
    write_report(findings, tuning.folder / REPORT_FILE)
    return findings


def _findings(
    tuning: Tuning, best: Recipe, result: Result | None, outcome: str, cures: CureFindings | None
) -> Findings:
    place = tuning.place
    train_data = place.plan.data.train
    found = versions()
    return Findings(
        tunewise=found["tunewise"],
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=place.recipe.model.name,
        data=place.recipe.data.source,
        num_parameters=place.predictor(place.recipe).num_parameters(),
        num_documents=len(train_data),
        num_tokens=int(train_data.lengths.sum()),
        num_supervised_tokens=int(train_data.num_supervised.sum()),
        longest_document=int(train_data.lengths.max()),
        machine=place.machine.name,
        machine_memory_bytes=place.machine.memory_bytes,
        price_per_hour=tuning.options.price_per_hour,
        headline=headline(tuning),
        batch=tuning.batch,
        methods=tuning.methods,
        confirmation=tuning.confirmation,
        training=None if result is None else _training_result(tuning, result),
        quality=None if result is None else result.quality,
        cures=cures,
        costs=tuning.laboratory.costs(),
        budget_seconds=tuning.options.budget_seconds,
        search_seconds=tuning.laboratory.spent_seconds,
        elsewhere=elsewhere(tuning) if outcome == "complete" else (),
        recipe=best.to_mapping(),
        recipe_yaml=recipe_to_yaml(best),
        command=_command(tuning.folder / BEST, cures),
        outcome=outcome,
        versions=found,
    )


def _command(best: Path, cures: CureFindings | None) -> str:
    """Return what makes the result again."""
    chosen = cures.chosen_point if cures is not None else None
    if chosen is None or chosen.kind == "training":
        return f"tunewise train {best}"
    option = chosen.command.partition("DIR")[2]
    return f"tunewise train {best} --out NEW && tunewise export NEW --adapter NEW-cured{option}"


def _training_result(tuning: Tuning, result: Result) -> TrainingResult:
    trained = result.folder if (result.folder / "metrics.jsonl").is_file() else tuning.folder / "training"
    entries = read_metrics(trained / "metrics.jsonl")
    learnt, curve, training_curve = 0, [], []
    for entry in entries:
        if entry["event"] == "step":
            learnt += entry["supervised_tokens"]
            training_curve.append(Point(supervised_tokens=learnt, loss=entry["loss"]))
        elif entry["event"] == "evaluation":
            curve.append(Point(supervised_tokens=learnt, loss=entry["validation_loss"]))
    outcome = result.outcome
    seconds = tuning.run_seconds(result.recipe.batch.supervised_tokens or tuning.place.batch_tokens)
    return TrainingResult(
        first_loss=outcome.first_loss,
        best_loss=outcome.best_loss,
        best_step=outcome.best_step,
        steps=outcome.steps,
        seconds=outcome.seconds,
        tokens=outcome.tokens,
        peak_memory_bytes=outcome.peak_memory_bytes,
        predicted_seconds=Interval(middle=seconds, low=0.8 * seconds, high=1.25 * seconds),
        curve=tuple(curve),
        training_curve=tuple(training_curve),
        saved=str(result.saved.folder),
    )
