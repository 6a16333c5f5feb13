"""The general text at evaluations: recorded, and a budget that ends a training and says which states may be kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny_runs import assert_same_end, events, recipe_over, save_model, write_records
from tunewise import api
from tunewise.engine import train as training_loop
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.evaluate import validation_loss
from tunewise.errors import InputError, TrainingDiverged


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("workload")
    write_records(folder / "general.jsonl", num_records=30, seed=9)
    return save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=44)


Losses = tuple[tuple[float, float], ...]


@pytest.fixture
def come_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[Losses], None]:
    """Let the evaluations come out as (validation loss, general loss), one after the other."""

    def set_losses(losses: Losses) -> None:
        one_by_one = itertools.chain.from_iterable(losses)
        monkeypatch.setattr(training_loop, "validation_loss", lambda *arguments: next(one_by_one))

    return set_losses


def recipe(files: tuple[Path, Path], **evaluation: Any) -> dict[str, Any]:
    general = {"every": 1, "general_text": str(files[1].with_name("general.jsonl")), "general_tokens": 80}
    return recipe_over(*files, evaluation={**general, **evaluation})


def test_both_losses_are_recorded_and_the_first_is_the_base(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = api.train(recipe(files, every=3), out=tmp_path / "run")
    evaluations = events(tmp_path / "run", "evaluation")
    assert [entry["step"] for entry in evaluations] == [0, 3, 6]
    base, last = evaluations[0]["general_loss"], evaluations[-1]["general_loss"]
    assert base != last
    kept = next(entry for entry in evaluations if entry["step"] == result.outcome.best_step)
    assert result.outcome.forgetting == kept["general_loss"] - base


def test_without_a_general_text_nothing_is_measured(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = api.train(recipe_over(*files), out=tmp_path / "run")
    assert result.outcome.forgetting is None
    assert all("general_loss" not in entry for entry in events(tmp_path / "run", "evaluation"))


def test_the_first_evaluation_above_ends_it_and_the_best_within_is_kept(
    files: tuple[Path, Path], tmp_path: Path, come_out: Callable[[Losses], None]
) -> None:
    come_out(((9.0, 3.0), (8.0, 3.04), (6.0, 3.09), (7.0, 3.1), (4.0, 3.2), (1.0, 3.0)))
    outcome = api.train(recipe(files, forgetting_budget=0.15), out=tmp_path / "run").outcome
    assert outcome.steps == 4, "what lies behind the first evaluation above is not looked at"
    assert "forgetting of 0.200 nats after step 4, over the budget of 0.15" in outcome.reason
    assert (outcome.best_step, outcome.best_loss) == (2, 6.0)
    assert outcome.forgetting == pytest.approx(0.09)
    kept = dict(list_checkpoints(tmp_path / "run" / "checkpoints"))
    assert 2 in kept
    assert load_checkpoint(kept[2])[1]["progress"]["best_step"] == 2


def test_a_lower_loss_above_the_budget_is_not_the_best(
    files: tuple[Path, Path], tmp_path: Path, come_out: Callable[[Losses], None]
) -> None:
    come_out(((9.0, 3.0), (8.0, 3.1), (2.0, 3.11)))
    outcome = api.train(recipe(files, forgetting_budget=0.1 + 1e-9), out=tmp_path / "run").outcome
    assert (outcome.steps, outcome.best_step, outcome.best_loss) == (2, 1, 8.0)


def test_nothing_within_the_budget_is_said(
    files: tuple[Path, Path], tmp_path: Path, come_out: Callable[[Losses], None]
) -> None:
    come_out(((9.0, 3.0), (8.0, 4.0)))
    outcome = api.train(recipe(files, forgetting_budget=0.1), out=tmp_path / "run").outcome
    assert outcome.best_step is None
    assert outcome.forgetting == 1.0, "the last state is what is kept"
    assert "no evaluation was within it" in outcome.reason


def test_a_budget_that_is_never_reached_changes_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    api.train(recipe(files), out=tmp_path / "free")
    api.train(recipe(files, forgetting_budget=100.0), out=tmp_path / "bounded")
    assert_same_end(tmp_path / "free", tmp_path / "bounded")


def test_a_general_loss_that_is_no_number_stops(
    files: tuple[Path, Path], tmp_path: Path, come_out: Callable[[Losses], None]
) -> None:
    come_out(((9.0, 3.0), (8.0, float("nan"))))
    with pytest.raises(TrainingDiverged, match="general text nan"):
        api.train(recipe(files), out=tmp_path / "run")


def test_what_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="set keep_best to true"):
        api.train(recipe(files, forgetting_budget=0.1, keep_best=False), out=tmp_path / "one")
    without = recipe(files, forgetting_budget=0.1)
    without["data"] = {**without["data"], "validation_fraction": 0.0}
    with pytest.raises(InputError, match="forgetting_budget"):
        api.train(without, out=tmp_path / "two")


def test_a_budget_alone_measures_the_default_text(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = api.train(
        recipe_over(*files, evaluation={"forgetting_budget": 9.0, "general_tokens": 64}), out=tmp_path / "run"
    )
    assert result.recipe.evaluation.general_text == "default"
    assert result.outcome.forgetting is not None


def test_the_loss_is_that_of_the_evaluation_itself(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The recorded first loss is the base model's on the very windows that the recipe's data hold."""
    result = api.train(recipe(files), out=tmp_path / "run")
    from tunewise.engine.assemble import assemble, settle

    plan = settle(result.recipe)
    assert plan.data.general is not None
    run = assemble(plan)
    expected = validation_loss(run, plan.data.general, range(len(plan.data.general)), run.layout)
    assert events(tmp_path / "run", "evaluation")[0]["general_loss"] == pytest.approx(expected, rel=1e-6)
