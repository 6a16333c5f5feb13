"""What happens inside a cure's process: train again, or look along the line from the base to what was trained.

A training lies in a run folder of its own, so one that was killed goes on where it was, and one that is finished is
read. Afterwards-cures measure the base, some factors of the change and the average of the checkpoints; only the best
factor within the budget, and the average if it is within it, are put to the whole gate, and saved when they pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewise.api import resume, train
from tunewise.curing.cures import AFTERWARDS
from tunewise.curing.finished import finished_result
from tunewise.engine.averaging import average
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.finished import Finished, open_finished
from tunewise.engine.run_folder import write_whole
from tunewise.errors import CheckpointError, Conflict
from tunewise.evaluation import Judge, read_report, write_report
from tunewise.export.finish import save_result
from tunewise.lab.outcome import JudgedState, Measurement
from tunewise.lab.trial import Trial
from tunewise.quality.forgetting import change_of, forgetting
from tunewise.quality.measured import Forgetting, Measured
from tunewise.quality.scores import Scores, losses_of
from tunewise.quality.verdict import QualityReport
from tunewise.recipe import QualitySpec

FACTORS = (0.75, 0.5, 0.25)
"""Looked at first, from the most of the change to the least; then the middle above the first that is allowed."""


def try_cure(trial: dict[str, Any], data_folder: str, folder: str, cures: str, uncured: str) -> Measurement:
    """Try a cure and judge what comes of it.

    Args:
        trial: a `Trial` of the task "cure", as plain data.
        data_folder, folder: the tokenized data and the trial's own folder; a cure uses neither.
        cures: the folder in which every cure has one of its own.
        uncured: the run folder of the model that the gate refused.

    Raises:
        TunewiseError: as training does.
    """
    del data_folder, folder
    started = time.perf_counter()
    asked = Trial.model_validate(trial)
    work = _look_along if asked.cure == AFTERWARDS else _train_again
    found = work(asked, Path(cures), Path(uncured))
    return found.model_copy(update={"trial_seconds": time.perf_counter() - started})


def _train_again(asked: Trial, cures: Path, uncured: Path) -> Measurement:
    del uncured
    home = cures / asked.cure
    result = finished_result(home)
    if result is None:
        begun = (home / "recipe.yaml").is_file()
        result = resume(home) if begun else train(asked.read_recipe(), out=home)
    outcome, report = result.outcome, result.quality
    state = state_of(asked.cure, report, asked.cure) if report is not None else None
    return Measurement(
        states=() if state is None else (state,),
        loss=outcome.best_loss,
        steps=outcome.steps,
        supervised_tokens=outcome.supervised_tokens,
        tokens=outcome.tokens,
        training_seconds=outcome.seconds,
    )


def state_of(name: str, report: QualityReport, folder: str) -> JudgedState:
    """Return a judged state from the gate's report."""
    gain = next((check.measured for check in report.checks if check.name == "task gain"), None)
    lost = report.forgetting
    return JudgedState(
        name=name, gain=gain, forgetting=None if lost is None else lost.change, quality=report, folder=folder
    )


@dataclass(frozen=True)
class _Place:
    """What two losses say of one state: the gain, and what was forgotten."""

    gain: Measured | None
    lost: Forgetting | None

    def is_allowed(self, spec: QualitySpec) -> bool:
        """Whether these two do not already refuse it."""
        domains = self.lost.domains.values() if self.lost is not None else ()
        return (
            (self.gain is None or self.gain.low > spec.min_gain)
            and (self.lost is None or self.lost.change.middle <= spec.max_forgetting)
            and all(domain.middle <= spec.max_domain_forgetting for domain in domains)
        )


class _Line:
    """A finished run that can be anywhere between its base and what it was trained to."""

    def __init__(self, uncured: Path) -> None:
        self.finished: Finished = open_finished(uncured, "cured", with_line=True)
        assert self.finished.line is not None
        self.line = self.finished.line
        self.line.move_to(0.0)
        refused = read_report(uncured)
        self.judge = Judge(self.finished.plan, self.finished.run, 1.0 if refused is None else refused.fraction)
        self.spec = self.finished.plan.recipe.quality

    def here(self) -> _Place:
        """Measure the two losses where the run is now."""
        return _place(self.judge, losses_of(self.finished.run, self.judge.material))

    def judged(self, name: str, folder: Path, place: _Place) -> JudgedState:
        """Put the run, as it is now, to the whole gate, and save it when it passes."""
        run, tokenizer = self.finished.run, self.finished.plan.tokenizer
        report = self.judge.verdict(run, Path(), tokenizer)  # its losses on the way were those of another state
        if report.passed:
            save_result(run, tokenizer, folder)
            write_report(report, folder)
        return JudgedState(
            name=name,
            gain=place.gain,
            forgetting=None if place.lost is None else place.lost.change,
            quality=report,
            folder=folder.name if report.passed else "",
        )


def _place(judge: Judge, now: Scores) -> _Place:
    base, general = judge.base, judge.material.general
    gain = None
    if base.validation is not None and now.validation is not None:
        rise = change_of(base.validation, now.validation)
        gain = rise.model_copy(update={"middle": -rise.middle, "low": -rise.high, "high": -rise.low})
    lost = None
    if general is not None and base.general is not None and now.general is not None:
        lost = forgetting(general, base.general, now.general)
    return _Place(gain, lost)


def _look_along(asked: Trial, cures: Path, uncured: Path) -> Measurement:
    del asked
    line = _Line(uncured)
    places: dict[float, _Place] = {}

    def measure(factor: float) -> _Place:
        line.line.move_to(factor)
        places[factor] = line.here()
        return places[factor]

    best = best_factor(measure, line.spec)
    states = [_state(f"scale-{factor:g}", place) for factor, place in places.items() if factor != best]
    if best is not None:
        line.line.move_to(best)
        states.append(line.judged(f"scale-{best:g}", cures / f"scale-{best:g}", places[best]))
        _say(cures / f"scale-{best:g}", f"tunewise export {uncured} --adapter DIR --scale {best:g}")
    line.line.move_to(1.0)
    states += _averaged(line, cures, uncured)
    return Measurement(states=tuple(states))


def _averaged(line: _Line, cures: Path, uncured: Path) -> list[JudgedState]:
    """Average the checkpoints that are kept; there is nothing to average of one, or of what has no mean."""
    checkpoints = list_checkpoints(uncured / "checkpoints")
    if len(checkpoints) < 2:
        return []
    name = f"average-{len(checkpoints)}"
    try:
        average(line.finished.run, [load_checkpoint(path)[0] for _, path in checkpoints])
    except (CheckpointError, Conflict):
        return []
    place = line.here()
    if not place.is_allowed(line.spec):
        return [_state(name, place)]
    state = line.judged(name, cures / name, place)
    _say(cures / name, f"tunewise export {uncured} --adapter DIR --average-last {len(checkpoints)}")
    return [state]


def best_factor(measure: Callable[[float], _Place], spec: QualitySpec) -> float | None:
    """Return the largest factor that gain and forgetting allow, to an eighth; None when none is allowed.

    Forgetting is convex along the line and 0 at its beginning, so what is allowed is an interval from there.
    """
    above = 1.0
    for factor in FACTORS:
        if measure(factor).is_allowed(spec):
            between = (factor + above) / 2
            return between if measure(between).is_allowed(spec) else factor
        above = factor
    return None


def _state(name: str, place: _Place) -> JudgedState:
    return JudgedState(name=name, gain=place.gain, forgetting=None if place.lost is None else place.lost.change)


def _say(folder: Path, command: str) -> None:
    """Leave a note in a folder that is no run folder: what lies there, and what makes it again."""
    if folder.is_dir():
        write_whole(folder / "MADE-BY.txt", command + "\n")
