"""What a recipe leaves open is filled in, visibly, once; what it says stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from transformers import FalconConfig, GPT2Config, LlamaConfig

from tests.unit.random_recipes import recipes
from tunewise.errors import InputError
from tunewise.layers import native
from tunewise.methods import Fused, Packing, Precision, complete
from tunewise.methods.defaults import choose_device, complete_intervals, default_kernels
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import Recipe, Slot

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA = LlamaConfig(hidden_size=2048, max_position_embeddings=4096)


@pytest.fixture
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: None)


def completed(**changes: Any) -> Recipe:
    return complete(recipe_from_mapping({"model": "m", "data": "d", **changes}), LLAMA, CPU)


def names(recipe: Recipe) -> list[str]:
    return [method.name for method in recipe.methods or ()]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes())
def test_completing_twice_changes_nothing(recipe: Recipe) -> None:
    try:
        once = complete_intervals(complete(recipe, LLAMA, CPU), 77)
    except InputError:
        assume(False)
    assert complete_intervals(complete(once, LLAMA, CPU), 77) == once
    assert once.id == complete_intervals(complete(once, LLAMA, CPU), 77).id
    for slot in (Slot.PRECISION, Slot.ATTENTION, Slot.LOSS, Slot.OPTIMIZER):
        assert once.in_slot(slot)
    for method in recipe.methods or ():
        kept = once.get(type(method))
        assert kept == method or isinstance(method, Packing), "what the user wrote stays"
    assert recipe.training.learning_rate in (None, once.training.learning_rate)


@pytest.mark.usefixtures("_compiler")
def test_fine_tuning_gets_lora_packing_and_the_compiled_kernels() -> None:
    recipe = completed()
    assert names(recipe) == ["packing", "lora", "precision", "attention", "supervised_loss", "adamw", "fused"]
    assert recipe.get(Packing) == Packing(row_tokens=2048)
    assert (recipe.data.max_length, recipe.data.too_long, recipe.device) == (2048, "cut", "cpu")
    assert (recipe.batch.documents, recipe.batch.micro_batch_size) == (16, 1)
    assert recipe.training.epochs == 3.0


@pytest.mark.usefixtures("_compiler")
def test_training_from_scratch_gets_no_adapter() -> None:
    recipe = completed(objective="pretrain")
    assert names(recipe) == ["packing", "precision", "attention", "supervised_loss", "adamw", "fused"]
    assert (recipe.data.too_long, recipe.training.epochs) == ("split", 1.0)


@pytest.mark.usefixtures("_compiler")
def test_who_lists_methods_gets_exactly_these() -> None:
    """And the kernels, unless it is said how attention is computed."""
    assert names(completed(methods={})) == ["precision", "attention", "supervised_loss", "adamw", "fused"]
    assert names(completed(methods={"lion": None, "whole_loss": None, "attention": None})) == [
        "precision",
        "attention",
        "whole_loss",
        "lion",
    ]


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    "methods",
    [
        {"attention": {"kind": "per_document"}},
        {"attention": {"kind": "sdpa"}},
        {"peft": {"kind": "IA3"}},
        {"lora": None, "checkpointing": None, "stream": {"source": "host"}},
        {"precision": {"compute": "fp16"}},
    ],
    ids=str,
)
def test_who_gets_no_compiled_kernels(methods: dict[str, Any]) -> None:
    assert "fused" not in names(completed(methods=methods))


@pytest.mark.usefixtures("_compiler")
def test_compiled_kernels_are_for_known_models_on_a_cpu() -> None:
    recipe = recipe_from_mapping({"model": "m", "data": "d"})
    assert "fused" not in names(complete(recipe, GPT2Config(), CPU))
    assert "fused" not in names(complete(recipe, LLAMA, CUDA))

    class OfAModelsOwnCode(LlamaConfig):
        pass

    assert default_kernels([], LlamaConfig(), CPU) is not None
    assert default_kernels([], OfAModelsOwnCode(), CPU) is None


@pytest.mark.usefixtures("_compiler")
def test_attention_in_fp32_is_left_to_torch() -> None:
    for compute, with_attention in (("bf16", True), ("fp32", False)):
        assert completed(methods={"precision": {"compute": compute}}).get(Fused) == Fused(attention=with_attention)


def test_without_a_compiler_the_default_is_not_taken_and_a_wish_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "no compiler")
    assert "fused" not in names(completed())
    assert completed(methods={"fused": {"loss": False}}).get(Fused) == Fused(loss=False)


def test_the_learning_rate_depends_on_size_and_on_what_is_trained() -> None:
    """5e-4 * (2000 / hidden_size) ** 0.781 for adapters, a tenth of it for full fine-tuning."""
    assert completed().training.learning_rate == pytest.approx(5e-4 * (2000 / 2048) ** 0.781, rel=0.02)
    assert completed(methods={}).training.learning_rate == pytest.approx(4.9e-5)
    assert completed(training={"learning_rate": 3e-6}).training.learning_rate == 3e-6
    wide = complete(recipe_from_mapping({"model": "m", "data": "d"}), LlamaConfig(hidden_size=8192), CPU)
    assert wide.training.learning_rate == pytest.approx(1.7e-4)
    gpt2 = complete(recipe_from_mapping({"model": "m", "data": "d"}), GPT2Config(n_embd=768), CPU)
    assert gpt2.training.learning_rate == pytest.approx(1.1e-3)


def test_attention_follows_the_model() -> None:
    falcon = complete(recipe_from_mapping({"model": "m", "data": "d"}), FalconConfig(), CPU)
    assert falcon.in_slot(Slot.ATTENTION)[0].model_dump() == {"kind": "sdpa"}
    assert completed().in_slot(Slot.ATTENTION)[0].model_dump() == {"kind": "per_document"}


@pytest.mark.parametrize(
    ("batch", "documents", "micro_batch_size"),
    [
        ({}, 16, 4),
        ({"documents": 2}, 2, 2),
        ({"micro_batch_size": 3}, 16, 3),
        ({"gradient_accumulation_steps": 5}, 20, 4),
        ({"gradient_accumulation_steps": 5, "micro_batch_size": 2}, 10, 2),
        ({"documents": 12, "gradient_accumulation_steps": 3}, 12, 4),
        ({"supervised_tokens": 500}, None, 4),
    ],
)
def test_two_numbers_of_a_batch_give_the_third(
    batch: dict[str, int], documents: int | None, micro_batch_size: int
) -> None:
    found = completed(methods={"lora": None}, batch=batch).batch
    assert (found.documents, found.micro_batch_size) == (documents, micro_batch_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"gradient_accumulation_steps": 2}}, "with packing the number of rows differs"),
        ({"methods": {}, "batch": {"documents": 7, "gradient_accumulation_steps": 4}}, None),
        ({"methods": {}, "batch": {"documents": 9, "gradient_accumulation_steps": 6}}, "cannot be split evenly"),
        ({"methods": {}, "batch": {"supervised_tokens": 9, "gradient_accumulation_steps": 6}}, "varying number"),
    ],
)
def test_batches_that_cannot_be(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert completed(**changes).batch.micro_batch_size == 2  # 2 + 2 + 2 + 1
    else:
        with pytest.raises(InputError, match=message):
            completed(**changes)


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (9, 1), (10, 1), (250, 25)])
def test_intervals_follow_the_length_of_the_run(steps: int, every: int) -> None:
    recipe = complete_intervals(completed(), steps)
    assert (recipe.evaluation.every, recipe.checkpoints.every) == (every, every)
    kept = complete_intervals(completed(evaluation={"every": 3}), steps)
    assert (kept.evaluation.every, kept.checkpoints.every) == (3, every)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cuda' is not available here; there is: cpu"):
            choose_device("cuda")


def test_precision_that_is_named_stays() -> None:
    assert completed(methods={"precision": {"compute": "bf16"}}).get(Precision) == Precision(compute="bf16")
