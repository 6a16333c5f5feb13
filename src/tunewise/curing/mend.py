"""A refused model of a tuning is mended: cures are tried as trials of the tuning, and the best one is the result.

RUN/
  training/                 the uncured model: a run folder like any other, marked
  cures/
    replay-5.yaml           the recipe of each cure that trains, tried or not: tunewise train RUN/cures/replay-5.yaml
    replay-5/               its run folder
    scale-0.5/, average-3/  what was made of the uncured model without training
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tunewise.curing.cures import Cure, cures_of, unmendable
from tunewise.curing.finished import finished_result
from tunewise.curing.search import Question, search
from tunewise.curing.trial import state_of
from tunewise.engine.checkpoint import storage_errors
from tunewise.engine.run_folder import write_whole
from tunewise.evaluation import read_report, write_report
from tunewise.export.finish import Saved
from tunewise.export.result import Result
from tunewise.lab.cure_findings import CureFindings, CurePoint
from tunewise.lab.laboratory import Laboratory
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory
from tunewise.lab.trial import Trial
from tunewise.methods.reading import recipe_to_yaml
from tunewise.quality.verdict import FAILED_FILE, QualityReport

STUDY = "cures"
WORKER = "tunewise.curing.trial:try_cure"


def mend(
    result: Result, laboratory: Laboratory, folder: Path, left: Callable[[], float]
) -> tuple[Result, CureFindings]:
    """Return the best model, the cured one where there is a cure, and all that was tried.

    Args:
        result: a finished training whose model the gate refused.
        laboratory: of the tuning; what it has tried before is not tried again.
        folder: of the tuning.
        left: seconds of the budget that may still be spent.

    Raises:
        StorageError: the recipes of the cures, or an outcome, cannot be written.
        KeyboardInterrupt: the user stopped it; what was tried is kept, and a training goes on where it was.
    """
    report = result.quality
    assert report is not None, "a model without a verdict was not refused"
    cures, home = cures_of(result.recipe, result.outcome.steps), folder / STUDY
    numbers = {cure.name: number for number, cure in enumerate(cures)}
    _write_recipes(cures, home)

    def attempt(cure: Cure, seconds: float) -> Measurement | OutOfMemory | Failed:
        return laboratory.run(
            STUDY,
            Trial.of("cure", cure.recipe or result.recipe, cure=cure.name),
            params={"number": numbers[cure.name]},
            role=f"cure: {cure.label}",
            expected_seconds=seconds,
            function=WORKER,
            cures=str(home.resolve()),
            uncured=str(result.folder.resolve()),
        )

    def command(cure: Cure) -> str:
        if cure.recipe is not None:
            return f"tunewise train {home / cure.name}.yaml"
        return f"tunewise export {result.folder} --adapter DIR"

    question = Question(
        uncured=_uncured(result, report),
        unmendable=unmendable(report),
        cures=cures,
        training_seconds=result.outcome.seconds,
        max_forgetting=result.recipe.quality.max_forgetting,
        folder=home,
        command=command,
    )
    found = search(question, attempt, left)
    cured = _result_of(found.chosen_point, result)
    if cured is None:
        return result, found
    _mark(result, report, found)
    return cured, found


def _uncured(result: Result, report: QualityReport) -> CurePoint:
    state = state_of("uncured", report, "")
    failed = ", ".join(check.name for check in report.checks if check.status == "failed")
    return CurePoint(
        name=state.name,
        label="uncured",
        kind="uncured",
        gain=state.gain,
        forgetting=state.forgetting,
        kept=1.0 if state.gain is not None and state.gain.is_above_zero else None,
        passed=False,
        verdict=f"refused: {failed}",
        seconds=result.outcome.seconds,
        folder=str(result.folder),
        command=f"tunewise train {result.folder / 'recipe.yaml'}",
    )


def _write_recipes(cures: tuple[Cure, ...], home: Path) -> None:
    with storage_errors(f"cannot write to {home}"):
        home.mkdir(parents=True, exist_ok=True)
        for cure in cures:
            if cure.recipe is not None:
                write_whole(home / f"{cure.name}.yaml", f"# {cure.label}\n{recipe_to_yaml(cure.recipe)}")


def _result_of(chosen: CurePoint | None, uncured: Result) -> Result | None:
    """Return a cure as a result; None where there is none, or where its files are gone."""
    if chosen is None:
        return None
    folder = Path(chosen.folder)
    if chosen.kind == "training":
        return finished_result(folder)
    kind = next((kind for kind in ("adapter", "model") if (folder / kind).is_dir()), None)
    if kind is None:
        return None
    return Result(uncured.recipe, uncured.outcome, folder, Saved(kind, folder / kind, 0.0), read_report(folder))


def _mark(result: Result, report: QualityReport, found: CureFindings) -> None:
    """Say in the uncured model's folder where the cured one lies."""
    write_report(report, result.folder)
    assert found.chosen_point is not None
    mark = result.folder / FAILED_FILE
    said = mark.read_text(encoding="utf-8")
    with storage_errors(f"cannot write to {result.folder}"):
        write_whole(mark, f"{said}\nCured by {found.chosen_point.label}: {found.chosen_point.folder}\n")
