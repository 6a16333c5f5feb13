from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from tunewise.errors import InputError
from tunewise.lab.executor import Executor
from tunewise.lab.laboratory import Laboratory
from tunewise.lab.outcome import Failed, Interval, Measurement, OutOfMemory
from tunewise.lab.storage import Storage
from tunewise.lab.trial import Trial

RECIPE: dict[str, Any] = {"model": {"name": "embedded"}, "data": {"source": "stdlib"}}


class Counting(Executor):
    """Answers from a list instead of running anything."""

    def __init__(self, answers: list[Measurement | OutOfMemory | Failed]) -> None:
        super().__init__()
        self.answers, self.asked = list(answers), 0

    def run(
        self, function: str, arguments: dict[str, Any], folder: Path, timeout: float
    ) -> Measurement | OutOfMemory | Failed:
        self.asked += 1
        return self.answers.pop(0)


def laboratory(folder: Path, *answers: Measurement | OutOfMemory | Failed, **changes: Any) -> Laboratory:
    return Laboratory(
        Storage.in_folder(folder),
        Counting(list(answers)),
        folder / "trials",
        folder / "data",
        {"model": "a"},
        **changes,
    )


def ask(lab: Laboratory, **options: Any) -> Measurement | OutOfMemory | Failed:
    trial = Trial(task="learn", recipe=RECIPE, **options)
    return lab.run(
        "batch size",
        trial,
        params={"batch_tokens": 512, "learning_rate": 1e-3},
        role="an arm",
        expected_seconds=1.0,
    )


def asked(lab: Laboratory) -> int:
    assert isinstance(lab.executor, Counting)
    return lab.executor.asked


def test_the_same_trial_is_never_paid_for_twice(tmp_path: Path) -> None:
    first = laboratory(tmp_path, Measurement(loss=1.5, trial_seconds=3.0))
    assert ask(first) == ask(first)
    again = laboratory(tmp_path)  # another process, later
    outcome = ask(again)
    assert isinstance(outcome, Measurement)
    assert outcome.loss == 1.5
    assert (asked(first), asked(again)) == (1, 0)
    assert first.spent_seconds == again.spent_seconds == 3.0
    assert (first.costs()[0].num_reused, again.costs()[0].num_reused) == (0, 1)


def test_whatever_an_outcome_depends_on_makes_another_trial(tmp_path: Path) -> None:
    lab = laboratory(tmp_path, *[Measurement(loss=1.0)] * 4)
    ask(lab)
    ask(lab, repeat=1)
    ask(lab, evaluations=4)
    lab.circumstances = {"model": "b"}
    ask(lab)
    assert asked(lab) == 4


def test_failures_are_kept_and_tried_again_only_when_asked(tmp_path: Path) -> None:
    ask(laboratory(tmp_path, Failed(reason="the interpreter crashed: SIGSEGV")))
    again = laboratory(tmp_path)
    assert isinstance(ask(again), Failed)
    retrying = laboratory(tmp_path, Measurement(loss=1.0), retry_failed=True)
    assert isinstance(ask(retrying), Measurement)
    assert isinstance(ask(laboratory(tmp_path)), Measurement)


def test_the_storage_is_an_optuna_study(tmp_path: Path) -> None:
    curve = [{"supervised_tokens": 100, "loss": 2.0}, {"supervised_tokens": 200, "loss": 1.0}]
    lab = laboratory(tmp_path, Measurement.model_validate({"loss": 1.0, "curve": curve}), OutOfMemory(reason="full"))
    ask(lab)
    ask(lab, repeat=1)
    study = optuna.load_study(study_name="batch size", storage=f"sqlite:///{tmp_path / 'study.db'}")
    measured, failed = study.get_trials()
    assert study.best_trial.params == {"batch_tokens": 512, "learning_rate": 1e-3}
    assert measured.intermediate_values == {100: 2.0, 200: 1.0}
    assert failed.state == optuna.trial.TrialState.FAIL
    assert failed.user_attrs["reason"] == "full"
    assert optuna.visualization.is_available()
    assert optuna.visualization.plot_intermediate_values(study).data


def test_a_study_takes_parameters_of_any_size(tmp_path: Path) -> None:
    lab = laboratory(tmp_path, *[Measurement(loss=1.0)] * 3)
    for number, seed in enumerate((0, 1, 2**40)):
        trial = Trial(task="learn", recipe=RECIPE, repeat=number)
        params = {"seed": seed, "learning_rate": 10.0**-number, "packing": bool(number % 2)}
        lab.run("batch size", trial, params=params, role="", expected_seconds=1.0)
    assert asked(lab) == 3


def test_methods_have_two_objectives(tmp_path: Path) -> None:
    step = Interval(middle=0.5, low=0.4, high=0.6)
    lab = laboratory(tmp_path, Measurement(step_seconds=step, peak_tensor_bytes=1000))
    lab.run(
        "methods",
        Trial(task="measure", recipe=RECIPE),
        params={"packing": True, "lora": False},
        role="alone",
        expected_seconds=1.0,
    )
    study = optuna.load_study(study_name="methods", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.get_trials()[0].values == [0.5, 1000.0]


def test_tunings_can_share_a_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    one, other = Storage(url, "one: "), Storage(url, "other: ")
    one.add("batch size", "key", Measurement(loss=1.0), params={}, values=(1.0,), attributes={})
    assert Storage(url, "one: ").find("key") is not None
    assert Storage(url, "other: ").find("key") is None
    assert other.find("key") is None


def test_a_storage_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        Storage("nosuch://nowhere", "")
    with pytest.raises(InputError, match="cannot be opened"):
        Storage(f"sqlite:///{tmp_path}/no/such/folder/study.db", "")
