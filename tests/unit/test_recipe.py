"""A recipe is data: validated, written and read back without loss, equal for equal content."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.random_recipes import OPTIONS, methods, recipes
from tunewise.methods import ALL, BY_NAME, Checkpointing, LoRA, Packing, Precision
from tunewise.methods.reading import load_recipe, recipe_from_mapping, recipe_to_yaml
from tunewise.recipe import BatchSpec, DataSpec, Method, ModelSpec, Recipe, Slot, TrainingSpec

MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def small(**changes: Any) -> Recipe:
    return Recipe(model=ModelSpec(name="m"), data=DataSpec(source="d"), **changes)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def test_random_recipes_know_every_method_and_option() -> None:
    assert OPTIONS.keys() == BY_NAME.keys()
    left_out = {
        f"{name}.{field}" for name, kind in BY_NAME.items() for field in kind.model_fields if field not in OPTIONS[name]
    }
    assert left_out == {f"quantize.{field}" for field in ("block_size", "compute", "head_compute", "skip_modules")}


@MANY
@given(recipe=recipes())
def test_round_trip_is_the_identity(recipe: Recipe, file: Path) -> None:
    file.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    again = load_recipe(file)
    assert again == recipe
    assert again.id == recipe.id
    assert again.to_mapping() == recipe.to_mapping()
    assert recipe_from_mapping(json.loads(json.dumps(recipe.to_mapping()))) == recipe


@MANY
@given(chosen=methods(), order=st.randoms())
def test_the_order_of_methods_does_not_matter(chosen: tuple[Method, ...], order: random.Random) -> None:
    shuffled = list(chosen)
    order.shuffle(shuffled)
    one, other = small(methods=chosen), small(methods=tuple(shuffled))
    assert one == other
    assert one.id == other.id
    assert [method.slot for method in one.methods or ()] == sorted(method.slot for method in chosen)


@MANY
@given(recipe=recipes())
def test_the_id_follows_the_content(recipe: Recipe) -> None:
    assert recipe.replace(out="elsewhere", report_to=()).id == recipe.id
    assert recipe.replace(seed=recipe.seed ^ 1).id != recipe.id
    assert recipe.replace(data=recipe.data.model_copy(update={"source": recipe.data.source + "x"})).id != recipe.id


def test_an_id_is_twelve_hexadecimal_digits() -> None:
    assert len(small().id) == 12
    assert int(small().id, 16) >= 0
    assert small().id == small().id


def test_model_and_data_are_enough() -> None:
    recipe = recipe_from_mapping({"model": "m", "data": "d.jsonl"})
    assert recipe == Recipe(model=ModelSpec(name="m"), data=DataSpec(source="d.jsonl"))
    assert recipe.methods is None


def test_methods_are_found_by_class_and_slot() -> None:
    recipe = small(methods=(LoRA(rank=3), Packing(), Checkpointing()))
    assert recipe.get(LoRA) == LoRA(rank=3)
    assert recipe.get(Precision) is None
    assert recipe.in_slot(Slot.ACTIVATIONS) == (Checkpointing(),)
    assert small().in_slot(Slot.ADAPTER) == ()


def test_every_method_has_its_place() -> None:
    for kind in ALL:
        assert kind.name == kind.name.lower()
        assert kind.slot in Slot
        assert kind.fidelity is not None
    assert [kind.slot for kind in ALL] == sorted(kind.slot for kind in ALL)
    assert len(BY_NAME) == len(ALL) == 35


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(methods=(LoRA(), LoRA(rank=2))), "'lora' stands in the recipe twice"),
        (lambda: BatchSpec(documents=4, supervised_tokens=9), "not both"),
        (lambda: BatchSpec(documents=9, micro_batch_size=2, gradient_accumulation_steps=4), "leave one of the three"),
        (lambda: TrainingSpec(epochs=1.0, steps=3), "give one of"),
        (lambda: TrainingSpec(learning_rate=float("nan")), "learning_rate"),
        (lambda: small(seed=-1), "seed"),
    ],
)
def test_nonsense_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValidationError, match=message):
        make()


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        small().seed = 3
