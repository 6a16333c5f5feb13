"""Numbers go to the trackers that the recipe names; one that is missing is an error before anything is trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny_runs import events, recipe_over, save_model, write_records
from tunewise import api
from tunewise.errors import MissingBackend
from tunewise.recipe import DataSpec, ModelSpec, Recipe
from tunewise.report import trackers
from tunewise.report.trackers import open_trackers

LIBRARIES = ("tensorboard", "wandb", "mlflow", "trackio")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("workload")
    model, records = save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=30)
    return recipe_over(model, records, training={"steps": 2})


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_tracker_is_an_error(library: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    with pytest.raises(MissingBackend, match=rf"report_to: {library} needs .*\n.*pip install 'tunewise\[{library}\]'"):
        api.train({**recipe, "report_to": [library]}, out=tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_tensorboard_gets_the_numbers(recipe: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    api.train({**recipe, "report_to": ["tensorboard"]}, out=tmp_path / "run")
    written = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    written.Reload()
    losses = [(scalar.step, scalar.value) for scalar in written.Scalars("train/loss")]
    steps = [(entry["step"], pytest.approx(entry["loss"], rel=1e-6)) for entry in events(tmp_path / "run", "step")]
    assert losses == steps
    assert {"train/learning_rate", "validation/loss"} <= set(written.Tags()["scalars"])


def test_numbers_are_passed_on_and_trackers_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[dict[str, float], int]] = []
    closed: list[str] = []
    monkeypatch.setitem(
        trackers._OPEN,
        "trackio",
        lambda recipe, folder: (lambda scalars, step: got.append((scalars, step)), lambda: closed.append("trackio")),
    )
    recipe = Recipe(model=ModelSpec(name="m"), data=DataSpec(source="d"), report_to=("trackio",))
    step = {"event": "step", "step": 7, "loss": 2.5, "grad_norm": None, "learning_rate": 1e-4, "memory_bytes": 9}

    def train() -> None:
        with open_trackers(recipe, tmp_path) as track:
            track({"event": "note", "message": "hello"})
            track(step)
            track({"event": "evaluation", "step": 7, "validation_loss": 3.0, "is_best": True})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert got == [
        ({"train/loss": 2.5, "train/learning_rate": 1e-4, "train/memory_bytes": 9.0}, 7),
        ({"validation/loss": 3.0}, 7),
    ]
    assert closed == ["trackio"]
