"""A trial that runs out of memory, hangs, crashes the interpreter or fills the disk is an outcome; the study goes on.

The studies, the laboratory, its storage and the processes are the real ones; only what a trial computes is a formula
(`faulty_trials`), so that a study takes seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.faults import faulty_trials
from tests.faults.faulty_trials import FAULTS, LAB, MEBIBYTE, num_run, plan_faults
from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise.errors import StorageError
from tunewise.lab import laboratory as module
from tunewise.lab.arms import RecipeArms
from tunewise.lab.batch_study import BatchQuestion, BatchStudy
from tunewise.lab.executor import Executor
from tunewise.lab.factors import factor_space
from tunewise.lab.laboratory import Laboratory
from tunewise.lab.method_study import MethodStudy
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory
from tunewise.lab.storage import Storage
from tunewise.lab.trial import Trial
from tunewise.lab.verdict import Verdict
from tunewise.lab.workplace import open_workplace
from tunewise.methods.reading import recipe_from_mapping

REASONS = {
    "runs out of memory": "allocate memory",
    "is killed by the system": "memory ran out",
    "hangs": "longer than",
    "crashes the interpreter": "SIGSEGV",
    "raises": "a bug in a method",
    "fills the disk": "No space left on device",
}
RECIPE: dict[str, Any] = {
    "model": {"name": "embedded"},
    "data": {"source": "stdlib"},
    "methods": {"adamw": {"beta2": 0.99}},
    "batch": {"supervised_tokens": 2048, "micro_batch_size": 4},
    "training": {"tokens": 2_000_000, "learning_rate": 0.7 * LAB.best_learning_rate(2048)},
}


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(memory_bytes=512 * MEBIBYTE) as executor:
        yield executor


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only a trial that hangs waits for it; on a crowded machine a process can take seconds to die of its fault.
    monkeypatch.setattr(module, "SHORTEST_TIMEOUT", 10.0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root may mount a small file system")
    command = [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def open_laboratory(executor: Executor, storage: Path, trials: Path, data: Path) -> Laboratory:
    return Laboratory(Storage.in_folder(storage), executor, trials, data, {"model": "a formula"})


def test_a_batch_study_goes_on_whatever_becomes_of_its_trials(
    executor: Executor, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORKER", f"{faulty_trials.__name__}:arm")
    data = tmp_path / "data"
    plan_faults(data, dict(zip((2, 4, 6, 7, 9, 11), FAULTS, strict=True)))
    lab = open_laboratory(executor, tmp_path, small_disk, data)
    verdict = study_batch(lab)
    failed = [
        trial for trial in trials(tmp_path, "batch size") if "reason" in trial.user_attrs and trial.values is None
    ]
    assert [trial.number + 1 for trial in failed] == [2, 4, 6, 7, 9, 11]
    for trial, fault in zip(failed, FAULTS, strict=True):
        assert REASONS[fault] in trial.user_attrs["reason"], fault
    assert lab.costs()[0].num_failed == 6
    assert verdict.chosen is not None
    assert num_run(data) > 15
    again = open_laboratory(executor, tmp_path, small_disk, data)  # the same command once more
    assert study_batch(again) == verdict
    assert again.costs()[0].num_reused == again.costs()[0].num_trials == num_run(data)


def study_batch(lab: Laboratory) -> Verdict:
    arms = RecipeArms(
        lab, recipe_from_mapping(RECIPE), step_seconds=lambda tokens: 1e-5 + 1e-8 * tokens, overhead_seconds=0.05
    )
    question = BatchQuestion(
        batch_tokens=2048,
        learning_rate=RECIPE["training"]["learning_rate"],
        beta2=0.99,
        run_tokens=2_000_000,
        document_tokens=100.0,
        budget_seconds=25.0,  # of which the trial that hangs takes ten
        run_seconds=lambda batch: arms.seconds(batch, 2_000_000),
    )
    return BatchStudy(arms, question).answer()


def test_a_method_study_leaves_out_what_fails_and_measures_the_rest(
    executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORKER", f"{faulty_trials.__name__}:combination")
    model = save_model(tmp_path / "model")
    mapping = recipe_over(model, write_records(tmp_path / "records.jsonl"))
    place = open_workplace(recipe_from_mapping(mapping), tmp_path / "run", "here", None)
    predictor = place.predictor(place.recipe)
    space = factor_space(place.recipe, place.plan.config, place.machine, predictor)
    plan_faults(tmp_path / "calm", {})
    calm = open_laboratory(executor, tmp_path / "first", tmp_path / "first" / "trials", tmp_path / "calm")
    undisturbed = MethodStudy(calm, space, place.limit_bytes, 60.0, step_seconds=0.01)
    undisturbed.run()
    order, data = list(undisturbed.tried), tmp_path / "data"
    crashing, hanging = (1 + order.index(frozenset({name})) for name in ("supervised loss", "checkpointing"))
    plan_faults(data, {crashing: "crashes the interpreter", hanging: "hangs", hanging + 3: "runs out of memory"})
    lab = open_laboratory(executor, tmp_path / "run", tmp_path / "run" / "trials", data)
    study = MethodStudy(lab, space, place.limit_bytes, 60.0, step_seconds=0.01)
    study.run()
    excluded = dict(study.excluded)
    assert "SIGSEGV" in excluded["supervised loss"]
    assert "longer than" in excluded["checkpointing"]
    assert "packing" in study.winner
    assert not {"supervised loss", "checkpointing"} & study.winner
    outcomes = [outcome for tried in study.tried.values() for outcome in tried.outcomes]
    # On a crowded machine one more may be stopped for its time.
    assert sum(isinstance(outcome, Failed) for outcome in outcomes) >= 2
    assert sum(isinstance(outcome, OutOfMemory) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Measurement) for outcome in outcomes) > 8


def ask(lab: Laboratory, number: int) -> Measurement | OutOfMemory | Failed:
    """Run one arm; the number makes it another one."""
    training = {**RECIPE["training"], "tokens": 100_000 + number}
    trial = Trial(task="learn", recipe={**RECIPE, "training": training, "seed": number})
    return lab.run(
        "batch size", trial, params={"batch_tokens": 2048, "seed": number}, role=f"arm {number}", expected_seconds=0.1
    )


def test_when_the_storage_is_full_nothing_finished_is_lost_and_the_same_command_goes_on(
    executor: Executor, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORKER", f"{faulty_trials.__name__}:arm")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # Optuna waits between its attempts to write
    data = tmp_path / "data"
    plan_faults(data, {3: "fills the disk"})
    lab = open_laboratory(executor, small_disk, small_disk / "trials", data)
    first = [ask(lab, number) for number in (1, 2, 3, 4)]
    assert [outcome.kind for outcome in first] == ["measurement", "measurement", "failed", "measurement"]
    fill(small_disk / "ballast")
    with pytest.raises(StorageError, match=r"make room and start the same command again"):
        [ask(lab, number) for number in range(5, 50)]
    (small_disk / "ballast").unlink()
    begun = num_run(data)
    again = open_laboratory(executor, small_disk, small_disk / "trials", data)
    assert [ask(again, number) for number in (1, 2, 3, 4)] == first
    assert num_run(data) == begun
    rest = [ask(again, number) for number in range(5, begun + 2)]
    assert all(isinstance(outcome, Measurement) for outcome in rest)
    assert len(trials(small_disk, "batch size")) == begun + 1


def test_a_trial_whose_outcome_was_written_but_not_kept_is_not_run_again(
    executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves between the two."""
    monkeypatch.setattr(module, "WORKER", f"{faulty_trials.__name__}:arm")
    data = tmp_path / "data"
    data.mkdir()
    lab = open_laboratory(executor, tmp_path, tmp_path / "trials", data)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lab.storage, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(lab, 1)
    again = open_laboratory(executor, tmp_path, tmp_path / "trials", data)
    assert isinstance(ask(again, 1), Measurement)
    assert num_run(data) == 1
    assert again.costs()[0].num_reused == 1
    assert len(trials(tmp_path, "batch size")) == 1


def trials(folder: Path, study: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=study, storage=f"sqlite:///{folder / 'study.db'}").get_trials()


def fill(file: Path) -> None:
    """Write until nothing fits any more."""
    with file.open("wb", buffering=0) as stream:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
