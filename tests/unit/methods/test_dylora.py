"""DyLoRA as a method: ranks are drawn from the seed, resumed bit for bit, and exported as plain LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.unit.architectures import tiny_model
from tests.unit.methods.adapted import make_recipe, make_run
from tests.unit.tiny_runs import (
    assert_same_end,
    logits,
    recipe_over,
    relative_error,
    save_model,
    train_interrupted,
    write_records,
)
from tunewise import api
from tunewise.cli import app
from tunewise.engine.step import begin_step
from tunewise.errors import InputError
from tunewise.layers.dylora import dylora_layers
from tunewise.methods import DyLoRA, LoRA
from tunewise.methods.compatibility import conflicts
from tunewise.methods.reading import load_recipe
from tunewise.recipe import ModelSpec
from tunewise.workload.model import load_config, load_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dylora")
    methods = {"dylora": {"rank": 6}, "packing": {"row_tokens": 96}, "precision": {"compute": "fp32"}}
    return recipe_over(save_model(folder / "model"), write_records(folder / "records.jsonl"), methods=methods)


@pytest.fixture(scope="module")
def finished(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.train(recipe, out=tmp_path_factory.mktemp("finished") / "run").folder


def drawn(seed: int, steps: int = 60, **options: Any) -> list[int]:
    run = make_run(tiny_model("llama"), DyLoRA(rank=6, **options), seed=seed)
    ranks = []
    for step in range(steps):
        begin_step(run, step)
        found = {layer.active_rank for layer in dylora_layers(run.model).values()}
        assert len(found) == 1
        ranks.append(found.pop())
    return ranks


def test_ranks_follow_from_the_seed_and_the_step() -> None:
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert sorted(set(drawn(3))) == [1, 2, 3, 4, 5, 6]
    assert sorted(set(drawn(3, ranks=(1, 4)))) == [1, 4]


def test_a_resumed_run_is_the_uninterrupted_one(recipe: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    train_interrupted(recipe, tmp_path / "run")
    assert_same_end(tmp_path / "run", finished)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_every_rank_is_exported_as_a_lora_that_peft_loads(finished: Path, tmp_path: Path, rank: int) -> None:
    peft = pytest.importorskip("peft")
    done = CliRunner().invoke(app, ["export", str(finished), "--rank", str(rank), "--adapter", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    merged = CliRunner().invoke(app, ["export", str(finished), "--rank", str(rank), "--merged", str(tmp_path / "m")])
    assert merged.exit_code == 0, merged.output
    adapted = peft.PeftModel.from_pretrained(base_model(finished), tmp_path / "a")
    assert adapted.peft_config["default"].r == rank
    model = ModelSpec(name=str(tmp_path / "m"))
    expected = logits(load_model(model, load_config(model), torch.float32, seed=0))
    assert relative_error(logits(adapted), expected) < 1e-5


def base_model(run: Path) -> torch.nn.Module:
    spec = load_recipe(run / "recipe.yaml").model
    model: torch.nn.Module = load_model(spec, load_config(spec), torch.float32, seed=0)
    return model


def test_clear_errors(finished: Path) -> None:
    with pytest.raises(InputError, match="this run trained the ranks 1 to 6"):
        api.export_rank(finished, 7)
    done = CliRunner().invoke(app, ["export", str(finished)])
    assert done.exit_code != 0
    assert "low-rank updates of the same layers" in conflicts(make_recipe(LoRA(), DyLoRA()))[0]
    with pytest.raises(ValueError, match="'ranks' must name some of 1 to 4"):
        DyLoRA(rank=4, ranks=(5,))
