"""Arms train in memory by the package's own loop: equal seeds give equal losses, parts are kept, a stop is a stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise.errors import Interrupted
from tunewise.methods.method import Run
from tunewise.reproduce import learning
from tunewise.reproduce.bench import Bench, Size
from tunewise.reproduce.learning import figures_of, held_out, learn, over_seeds, plan_of, scratch


@pytest.fixture(scope="module")
def mapping(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("workload")
    return recipe_over(save_model(folder / "model"), write_records(folder / "records.jsonl"))


def test_an_arm_learns_and_comes_out_the_same_again(mapping: dict[str, Any]) -> None:
    once, again = figures_of(mapping), figures_of(mapping)
    assert once["loss"] < once["first"]
    assert {k: v for k, v in once.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    assert once["seconds"] > 0
    assert once["diverged"] == 0


def test_data_are_prepared_once_for_all_arms_that_share_them(mapping: dict[str, Any]) -> None:
    plain, other = plan_of(mapping), plan_of({**mapping, "training": {"steps": 2}})
    assert plain.data is other.data
    assert plan_of({**mapping, "seed": 7}).data is not plain.data


def test_a_change_comes_before_the_first_evaluation(mapping: dict[str, Any]) -> None:
    @torch.no_grad()
    def break_it(run: Run) -> None:
        for parameter in run.model.parameters():
            parameter.zero_()

    assert learn(mapping, change=break_it).first_loss == pytest.approx(torch.log(torch.tensor(4096.0)).item(), abs=1e-4)


def test_held_out_losses_are_the_validation_loss(mapping: dict[str, Any]) -> None:
    learnt = learn(mapping)
    assert held_out(learnt).mean == pytest.approx(learnt.loss, rel=1e-5)


def test_a_signal_stops_the_arm_and_says_that_nothing_is_lost(mapping: dict[str, Any]) -> None:
    def ask(run: Run, entry: dict[str, Any]) -> None:
        if entry["event"] == "step" and entry["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="the same command goes on") as stop:
        learn(mapping, watch=ask)
    assert stop.value.exit_code == 130


def test_every_arm_is_trained_with_every_seed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def count(mapping: dict[str, Any]) -> dict[str, float]:
        asked.append(mapping)
        return {"loss": float(len(asked))}

    monkeypatch.setattr(learning, "figures_of", count)
    arms = {"a": lambda seed: {"arm": "a", "seed": seed}, "b": lambda seed: {"arm": "b", "seed": seed}}
    found = over_seeds(Bench(Size.TINY, tmp_path), arms, seeds=2)
    assert [(each["arm"], each["seed"]) for each in asked] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert found == {"a": [{"loss": 1.0}, {"loss": 3.0}], "b": [{"loss": 2.0}, {"loss": 4.0}]}
    assert over_seeds(Bench(Size.TINY, tmp_path), arms, seeds=2) == found
    assert len(asked) == 4


def test_a_model_from_scratch_is_its_seed_s(tmp_path: Path, mapping: dict[str, Any]) -> None:
    made = {
        **mapping,
        "model": scratch(tmp_path),
        "methods": {"precision": {"compute": "fp32"}},
        "training": {"steps": 1},
    }
    first = [learn({**made, "seed": seed}).first_loss for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
