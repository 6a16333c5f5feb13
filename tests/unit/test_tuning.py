from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise.errors import InputError
from tunewise.lab.findings import Findings
from tunewise.lab.tuning import Options
from tunewise.machine.probe import measure_machine
from tunewise.methods.reading import load_recipe, recipe_from_mapping
from tunewise.tuning import Tuned, Watch, tune
from tunewise.units import parse_budget

BUDGET = 12.0


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tuning")
    model = save_model(folder / "model", vocab_size=4096)
    records = write_records(folder / "records.jsonl", 120)
    return recipe_over(
        model,
        records,
        training={"steps": None, "epochs": 1, "learning_rate": 5e-3},
        evaluation={"every": None},
        checkpoints={"every": None},
        batch={"documents": 8, "micro_batch_size": 1},
    )


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    file = tmp_path_factory.mktemp("machine") / "machine.yaml"
    file.write_text(measure_machine(seconds=0.5).to_yaml())
    return Options(budget_seconds=BUDGET, machine=str(file))


@pytest.fixture(scope="module")
def tuned(
    start: dict[str, Any], options: Options, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tuned, list[str], float]:
    parts: list[str] = []
    started = time.monotonic()
    found = tune(
        recipe_from_mapping(start),
        tmp_path_factory.mktemp("out") / "run",
        options,
        watch=Watch(part=lambda name, seconds: parts.append(name)),
    )
    return found, parts, time.monotonic() - started


def test_the_procedure_in_its_order(tuned: tuple[Tuned, list[str], float]) -> None:
    assert tuned[1] == ["throughput", "batch size", "methods", "confirmation", "training"]


def test_the_findings_are_whole(tuned: tuple[Tuned, list[str], float]) -> None:
    findings = tuned[0].findings
    assert findings.outcome == "complete"
    assert len(findings.headline) == 3
    assert findings.batch is not None
    assert findings.batch.noise
    assert findings.batch.throughput
    assert findings.methods is not None
    # A busy machine spends the small budget on little; what is there whatever it spends is asserted.
    assert {trial.role for trial in findings.methods.trials} >= {"baseline", "candidate"}
    assert findings.methods.single
    assert findings.confirmation is not None
    assert findings.training is not None
    assert findings.training.best_loss is not None
    assert all(trial.outcome == "measured" for trial in findings.methods.trials)


def test_files_for_people_and_programs(tuned: tuple[Tuned, list[str], float]) -> None:
    folder = tuned[0].folder
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http-equiv" in page
    assert len(page) < 6_000_000
    assert Findings.model_validate_json((folder / "findings.json").read_bytes()) == tuned[0].findings
    best = load_recipe(folder / "best.yaml")
    assert best.batch.supervised_tokens == tuned[0].findings.batch.chosen_tokens  # type: ignore[union-attr]
    assert (folder / "training" / "adapter").is_dir()
    assert tuned[0].training is not None
    assert tuned[0].training.recipe.batch == best.batch


def test_what_the_user_did_not_ask_to_change_stays(
    tuned: tuple[Tuned, list[str], float], start: dict[str, Any]
) -> None:
    recipe, given = tuned[0].recipe, recipe_from_mapping(start)
    assert recipe.seed == given.seed
    assert recipe.data.source == given.data.source
    assert recipe.training.epochs == given.training.epochs
    lora = next(method for method in recipe.methods or () if method.name == "lora")
    assert lora == next(method for method in given.methods or () if method.name == "lora")


def test_the_same_command_again_runs_no_trial_again(
    tuned: tuple[Tuned, list[str], float], start: dict[str, Any], options: Options
) -> None:
    again = tune(recipe_from_mapping(start), tuned[0].folder, options)
    assert again.recipe == tuned[0].recipe
    assert all(cost.num_reused == cost.num_trials for cost in again.findings.costs)
    assert again.findings.batch == tuned[0].findings.batch
    assert again.findings.methods == tuned[0].findings.methods


def test_another_recipe_does_not_go_into_the_same_folder(
    tuned: tuple[Tuned, list[str], float], start: dict[str, Any], options: Options
) -> None:
    other = recipe_from_mapping({**start, "seed": 4})
    with pytest.raises(InputError, match="another recipe"):
        tune(other, tuned[0].folder, options)


def test_a_folder_with_other_things_is_left_alone(start: dict[str, Any], options: Options, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no tuning"):
        tune(recipe_from_mapping(start), tmp_path, options)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_tuning_needs_something_to_compare_by(start: dict[str, Any], options: Options, tmp_path: Path) -> None:
    blind = recipe_from_mapping({**start, "data": {**start["data"], "validation_fraction": 0.0}})
    with pytest.raises(InputError, match="validation"):
        tune(blind, tmp_path / "run", options)


def test_another_machine_is_for_planning(start: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tunewise plan"):
        tune(recipe_from_mapping(start), tmp_path / "run", Options(machine="RTX 4090"))


def test_findings_of_an_interrupted_search_are_written(start: dict[str, Any], options: Options, tmp_path: Path) -> None:
    def interrupt(name: str, seconds: float) -> None:
        if name == "batch size":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(recipe_from_mapping(start), tmp_path / "run", options, watch=Watch(part=interrupt))
    findings = json.loads((tmp_path / "run" / "findings.json").read_text())
    assert findings["outcome"] == "stopped by the user"
    assert findings["batch"] is None
    assert (tmp_path / "run" / "report.html").is_file()


def test_budgets_in_time_and_money() -> None:
    assert parse_budget("30m", None) == 1800
    assert parse_budget("$5", 2.5) == 7200
    assert parse_budget("5 EUR", 5.0) == 3600
    with pytest.raises(InputError, match="--price"):
        parse_budget("$5", None)
    with pytest.raises(InputError, match="duration"):
        parse_budget("soon", None)
