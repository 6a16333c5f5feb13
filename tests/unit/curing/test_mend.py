"""Cures for real: the embedded model forgets on purpose, and is mended in trials of a laboratory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_runs import recipe_over, write_records
from tunewise import api
from tunewise.curing import search
from tunewise.curing.cures import AFTERWARDS, EARLY_COST, GATE_COST, cures_of, unmendable
from tunewise.curing.finished import finished_result
from tunewise.curing.mend import mend
from tunewise.curing.trial import best_factor
from tunewise.engine.finished import open_finished
from tunewise.engine.train import Training
from tunewise.export.result import Result
from tunewise.lab.executor import Executor
from tunewise.lab.laboratory import Laboratory
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory
from tunewise.lab.storage import Storage
from tunewise.methods.reading import load_recipe
from tunewise.quality.measured import Measured
from tunewise.quality.verdict import FAILED_FILE, Check, QualityReport
from tunewise.recipe import QualitySpec
from tunewise.workload.model import EMBEDDED_FOLDER

BUDGET = 1.5
"""Nats; the embedded model learns made-up words within ten steps, and forgets Python's as fast."""


@dataclass
class Here(Executor):
    """Does a trial in this process."""

    asked: list[str] = field(default_factory=list)

    def __init__(self) -> None:
        super().__init__()
        self.asked = []

    def run(
        self, function: str, arguments: dict[str, Any], folder: Path, timeout: float
    ) -> Measurement | OutOfMemory | Failed:
        self.asked.append(arguments["trial"]["cure"])
        module, _, name = function.partition(":")
        found: Measurement = getattr(importlib.import_module(module), name)(**arguments)
        return found


def laboratory(folder: Path) -> Laboratory:
    return Laboratory(Storage.in_folder(folder), Here(), folder / "trials", folder / "data", {})


def asked(lab: Laboratory) -> list[str]:
    assert isinstance(lab.executor, Here)
    return lab.executor.asked


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run that learns fast and forgets more than it may, in a tuning's folder; its stricter neighbours pass."""
    folder = tmp_path_factory.mktemp("tuning")
    methods = {"lora": {"rank": 4}, "packing": {"row_tokens": 256}, "precision": {"compute": "fp32"}}
    mapping = recipe_over(
        EMBEDDED_FOLDER,
        write_records(folder / "records.jsonl", 60),
        methods=methods,
        batch={"documents": 8, "micro_batch_size": 4},
        training={"steps": 8, "learning_rate": 2e-2, "schedule": "constant"},
        evaluation={"every": 4, "general_tokens": 512},
        checkpoints={"every": 4, "keep": 2},
        quality={"gate": True, "max_forgetting": BUDGET, "max_domain_forgetting": 9, "max_gap": 9, "share": 0.2},
    )
    return folder, api.train(mapping, out=folder / "tuning" / "training")


def once(folder: Path, result: Result, seconds: float) -> tuple[Result, Any, list[str]]:
    lab = laboratory(folder)
    cured, found = mend(result, lab, folder, lambda: seconds)
    return cured, found, asked(lab)


def test_the_free_cure_is_tried_judged_saved_and_kept(refused: tuple[Path, Result]) -> None:
    folder, result = refused[0] / "tuning", refused[1]
    assert result.quality is not None
    assert [check.name for check in result.quality.checks if check.status == "failed"] == ["forgetting"]
    cured, found, tried = once(folder, result, 0.0)
    assert tried == [AFTERWARDS]
    chosen = found.chosen_point
    assert chosen is not None
    assert chosen.name.startswith("scale-")
    assert chosen.forgetting is not None
    assert chosen.forgetting.middle <= BUDGET < found.uncured.forgetting.middle
    assert 0.5 <= chosen.kept < 1.0
    assert cured.quality is not None
    assert cured.quality.passed
    assert cured.saved.folder == Path(chosen.folder) / "adapter"
    mark = (result.folder / FAILED_FILE).read_text()
    assert "forgetting" in mark
    assert chosen.folder in mark
    # The same call again: nothing is tried anew.
    again, same, tried = once(folder, result, 0.0)
    assert (tried, same, again.quality) == ([], found, cured.quality)


def test_what_was_saved_is_the_run_at_that_factor(refused: tuple[Path, Result], tmp_path: Path) -> None:
    folder, result = refused[0] / "tuning", refused[1]
    cured, found, _ = once(folder, result, 0.0)
    factor = float(found.chosen.removeprefix("scale-"))
    made, _ = api.export_adapter(result.folder, tmp_path / "again", scale=factor)
    one, other = (next(place.glob("*.safetensors")).read_bytes() for place in (cured.saved.folder, made.folder))
    assert one == other
    assert open_finished(result.folder, "scaled").plan.recipe.id == cured.recipe.id


def test_a_training_cure_goes_on_where_it_was_killed_and_becomes_the_result(
    refused: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = refused[0] / "tuning", refused[1]
    monkeypatch.setattr(search, "ENOUGH", 2.0)  # else the factor is good enough
    pays_for_one = 1.01 * EARLY_COST * GATE_COST * result.outcome.seconds
    stop = {"at": 2}
    record = Training.record

    def killed(self: Any, entry: dict[str, Any]) -> None:
        if entry["event"] == "step" and entry["step"] == stop["at"] and "cures" in str(self.folder.path):
            stop["at"] = -1
            raise KeyboardInterrupt
        record(self, entry)

    monkeypatch.setattr(Training, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        once(folder, result, pays_for_one)
    home = folder / "cures" / "early-stop"
    assert (home / "recipe.yaml").is_file()
    assert finished_result(home) is None
    monkeypatch.setattr(Training, "record", record)
    cured, found, tried = once(folder, result, pays_for_one)
    assert tried == ["early-stop"]
    assert '"event": "resumed"' in (home / "metrics.jsonl").read_text()
    (trained,) = [point for point in found.points if point.kind == "training"]
    assert trained.folder == str(home)
    assert [cure.name for cure in found.untried][:2] == ["rate-third", "replay-1"]
    best = max((p for p in found.points if p.is_cure), key=lambda p: p.gain.middle)
    assert found.chosen == best.name
    assert cured.quality is not None
    assert cured.quality.passed
    recipe = load_recipe(home.with_suffix(".yaml"))
    assert recipe.evaluation.forgetting_budget == BUDGET
    assert recipe.id == load_recipe(home / "recipe.yaml").id


def test_the_cures_of_a_recipe_and_their_order(refused: tuple[Path, Result]) -> None:
    recipe = refused[1].recipe
    cures = {cure.name: cure for cure in cures_of(recipe, 8)}
    assert list(cures) == [
        AFTERWARDS, "early-stop", "rate-third", "replay-1", "fewer-targets", "replay-5", "replay-25", "kl",
    ]  # fmt: skip
    costs = [cure.cost for cure in cures.values()]
    assert costs == pytest.approx(sorted(costs), abs=0.1)
    for cure in cures.values():
        if cure.recipe is not None:
            assert cure.recipe.id != recipe.id
            assert cure.recipe.quality == recipe.quality, "judged by the same thresholds"
    replay = cures["replay-25"].recipe
    assert replay is not None
    assert replay.training.steps == 11, "the task's own tokens stay: 8 / 0.75"
    assert cures["rate-third"].recipe.training.learning_rate == pytest.approx(2e-2 / 3, rel=1e-2)  # type: ignore[union-attr]


def test_what_the_gate_measures_is_not_replayed(refused: tuple[Path, Result]) -> None:
    spec = refused[1].recipe.quality.model_copy(update={"general_text": "own.txt"})
    cures = {cure.name: cure for cure in cures_of(refused[1].recipe.replace(quality=spec), 10)}
    replay, stop = cures["replay-5"].recipe, cures["early-stop"].recipe
    assert replay is not None
    assert replay.data.replay is not None
    assert replay.data.replay.source == "self"
    assert stop is not None
    assert stop.evaluation.general_text == "own.txt"


def check(name: str, middle: float | None = None) -> Check:
    measured = None if middle is None else Measured(middle=middle, low=middle, high=middle, noise_floor=0, num=9)
    return Check(name=name, status="failed", measured=measured, sentence="")


def test_faults_of_data_and_set_up_are_told_from_what_cures_mend() -> None:
    checks = (check("forgetting, prose"), check("leaks"), check("task gain", 0.01), check("overfitting"))
    assert unmendable(QualityReport(passed=False, checks=checks)) == ("leaks", "task gain")
    assert unmendable(QualityReport(passed=False, checks=(check("task gain", -0.2), checks[0]))) == ()


@pytest.mark.parametrize(("limit", "expected"), [(0.9, 0.875), (0.8, 0.75), (0.6, 0.5), (0.3, 0.25), (0.1, None)])
def test_the_best_factor_is_the_largest_that_is_allowed(limit: float, expected: float | None) -> None:
    @dataclass
    class Place:
        factor: float

        def is_allowed(self, spec: QualitySpec) -> bool:
            return self.factor <= limit

    measure: Callable[[float], Any] = Place
    assert best_factor(measure, QualitySpec()) == expected


def test_an_unfinished_run_has_no_result(refused: tuple[Path, Result], tmp_path: Path) -> None:
    result = refused[1]
    again = finished_result(result.folder)
    assert again is not None
    assert again.outcome == result.outcome
    assert again.saved.folder == result.saved.folder
    assert replace(again, quality=None) == replace(result, quality=None)
    assert finished_result(tmp_path) is None
    assert torch.is_grad_enabled()
