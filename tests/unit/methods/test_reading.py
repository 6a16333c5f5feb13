"""From YAML to a recipe: shorthands, settings, and errors that name the place and the nearest known word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunewise.errors import InputError
from tunewise.methods import AdamW, LoRA, Packing
from tunewise.methods.reading import load_recipe, method_from_mapping, recipe_from_mapping, with_settings

SHORT: dict[str, Any] = {"model": "m", "data": "d.jsonl"}


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_shorthands() -> None:
    recipe = recipe_from_mapping({**SHORT, "methods": ["lora", {"packing": {"row_tokens": 64}}]})
    assert (recipe.model.name, recipe.data.source) == ("m", "d.jsonl")
    assert recipe.methods == (Packing(row_tokens=64), LoRA())
    assert recipe == recipe_from_mapping({**SHORT, "methods": {"packing": {"row_tokens": 64}, "lora": None}})
    assert recipe == recipe_from_mapping({**SHORT, "methods": [Packing(row_tokens=64), LoRA()]})


def test_a_file_with_comments_and_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = "model: m # the model\ndata: d\ntraining:\n  learning_rate: 1e-4\n  steps: 1_000\nmethods:\n  adamw:\n"
    recipe = load_recipe(written(tmp_path, text), ["training.learning_rate=2e-5", "methods.lora.rank=8"])
    assert recipe.training.learning_rate == 2e-5
    assert recipe.training.steps == 1000
    assert recipe.methods == (LoRA(rank=8), AdamW())


def test_settings_go_through_shorthands_and_leave_the_original_alone() -> None:
    mapping: dict[str, Any] = {"model": "m", "data": {"source": "d"}}
    changed = with_settings(mapping, ["model.weights=random", "data.max_length=12", "seed=4", "methods.lora={rank: 2}"])
    recipe = recipe_from_mapping(changed)
    assert (recipe.model.name, recipe.model.weights) == ("m", "random")
    assert (recipe.data.source, recipe.data.max_length, recipe.seed) == ("d", 12, 4)
    assert recipe.get(LoRA) == LoRA(rank=2)
    assert mapping == {"model": "m", "data": {"source": "d"}}


def test_settings_reach_deep_without_touching_the_original() -> None:
    mapping: dict[str, Any] = {**SHORT, "methods": {"lora": {"rank": 4}}}
    assert recipe_from_mapping(with_settings(mapping, ["methods.lora.rank=9"])).get(LoRA) == LoRA(rank=9)
    assert mapping["methods"] == {"lora": {"rank": 4}}


def test_settings_find_methods_in_a_list() -> None:
    mapping = {**SHORT, "methods": ["packing", {"lora": {"rank": 4}}]}
    recipe = recipe_from_mapping(with_settings(mapping, ["methods.lora.alpha=3", "methods.adamw.fused=false"]))
    assert recipe.methods == (Packing(), LoRA(rank=4, alpha=3.0), AdamW(fused=False))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: m\n", ["'data' is missing", "at least a model and data"]),
        ("- m\n", ["holds no mapping"]),
        ("model: m\ndata: d\nseed: 1\nseed: 2\n", ["line 4", "'seed' stands twice"]),
        ("model: {name: m\n", ["not valid YAML", "line 2"]),
        ("model: m\ndata: d\ntrainig: {}\n", ["trainig: there is no such field", "Did you mean 'training'?"]),
        ("model: m\ndata: d\ntraining: {step: 3}\n", ["training.step", "Did you mean 'steps'?"]),
        ("model: m\ndata: d\ntraining: {steps: 0}\n", ["training.steps", "greater than 0", "given: 0"]),
        ("model: m\ndata: d\nmethods: {lorra: }\n", ["no method 'lorra'", "Did you mean 'lora'?"]),
        ("model: m\ndata: d\nmethods: {lora: {rnk: 3}}\n", ["methods.lora.rnk", "Did you mean 'rank'?"]),
        ("model: m\ndata: d\nmethods: {lora: {rank: x}}\n", ["methods.lora.rank", "given: 'x'"]),
        ("model: m\ndata: d\nmethods: {lora: 16}\n", ["methods.lora", "must be a mapping"]),
        ("model: m\ndata: d\nmethods: [lora, lora]\n", ["'lora' stands there twice"]),
        ("model: m\ndata: d\nmethods: lora\n", ["must map a method's name to its options"]),
    ],
)
def test_errors_name_the_place(text: str, parts: list[str], tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("seed", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("seed={", "not valid YAML"),
        ("seed.x=3", "'seed' is no section"),
    ],
)
def test_settings_that_cannot_be_read(setting: str, part: str) -> None:
    with pytest.raises(InputError, match="--set") as caught:
        with_settings({**SHORT, "seed": 1}, [setting])
    assert part in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no recipe file"):
        load_recipe(tmp_path / "none.yaml")


def test_options_of_one_method() -> None:
    assert method_from_mapping("lora", {"rank": 2, "target_modules": ["q_proj"]}) == LoRA(
        rank=2, target_modules=("q_proj",)
    )
    with pytest.raises(InputError, match="there is no method 'adamw8'"):
        method_from_mapping("adamw8", None)
