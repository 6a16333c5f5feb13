"""Which combinations there are, and why others are refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tunewise.errors import InputError
from tunewise.layers import native
from tunewise.machine.catalogue import find
from tunewise.methods.compatibility import conflicts
from tunewise.planner.case import Case, Question, settle
from tunewise.planner.space import Choice, Refused, Wishes, axes, enumerate_space
from tunewise.recipe import Fidelity, Recipe


def space(case: Case) -> tuple[list[Choice], list[Refused]]:
    options = axes(case.config, case.machine, case.base, case.wishes)
    return enumerate_space(options, case.base, case.wishes, case.load.documents_per_step)


def test_every_kept_combination_is_a_recipe_without_contradiction(tiny: str) -> None:
    case = settle(Question(tiny, length=64, machine="H100"))
    kept, refused = space(case)
    assert len(kept) > 500
    assert len(kept) + len(refused) == 5 * 3 * 4 * 8 * 2 * 2 * 2
    for choice in kept[::17]:
        recipe = choice.recipe(case.base, 16 if choice.updates_in_backward else 1)
        assert isinstance(recipe, Recipe)
        assert not conflicts(recipe)
        assert (recipe.training.max_grad_norm is None) == choice.updates_in_backward


def test_everything_refused_has_a_reason(tiny: str) -> None:
    _, refused = space(settle(Question(tiny, length=64, machine="T4")))
    assert all(each.reason for each in refused)
    words = " ".join(Counter(each.reason for each in refused))
    assert "cannot unscale fp16 gradients" in words
    assert "a frozen base gains nothing from fp32" in words


@pytest.mark.parametrize(("machine", "half"), [("T4", "fp16 mixed"), ("A100 80GB", "bf16 mixed")])
def test_the_16_bit_dtype_is_the_machines(tiny: str, machine: str, half: str) -> None:
    case = settle(Question(tiny, length=64, machine=machine))
    options = axes(case.config, case.machine, case.base, case.wishes)["precision"]
    assert options[0].label == half


def test_a_machine_that_is_slower_in_16_bits_computes_in_fp32(tiny: str) -> None:
    slow = find("T4").replace(flops_per_second={"fp32": 1e11, "bf16": 1e10})
    case = settle(Question(tiny, length=64, machine=slow))
    labels = [option.label for option in axes(case.config, slow, case.base, case.wishes)["precision"]]
    assert labels == ["fp32"]


def test_wishes_are_kept_to(tiny: str) -> None:
    case = settle(Question(tiny, length=64, machine="H100", wanted=("lora",), unwanted=("quantize", "packing")))
    kept, refused = space(case)
    names = [{method.name for method in choice.methods} for choice in kept]
    assert names
    assert all("lora" in each and not each & {"quantize", "packing"} for each in names)
    assert any(each.reason == "without lora, which was asked for" for each in refused)


def test_exact_quality_is_the_plain_run_and_checkpointing(tiny: str) -> None:
    kept, _ = space(settle(Question(tiny, length=64, machine="H100", quality="exact")))
    assert {choice.fidelity for choice in kept} == {Fidelity.EXACT}
    assert {method.name for choice in kept for method in choice.methods} == {
        "precision", "checkpointing", "adamw", "whole_loss", "attention",
    }  # fmt: skip


def test_a_wanted_method_joins_the_space(tiny: str) -> None:
    kept, _ = space(settle(Question(tiny, length=64, machine="H100", wanted=("sgd",))))
    assert kept
    assert all(any(method.name == "sgd" for method in choice.methods) for choice in kept)


@pytest.mark.parametrize(
    ("wanted", "unwanted", "says"),
    [(("lorra",), (), "Did you mean 'lora'"), (("lora",), ("lora",), "wanted and not wanted")],
)
def test_impossible_wishes_are_errors(wanted: tuple[str, ...], unwanted: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Wishes(wanted, unwanted)


def test_pre_training_has_no_adapters(tiny: str) -> None:
    case = settle(Question(tiny, length=64, machine="H100", settings=("objective=pretrain",)))
    assert [option.label for option in axes(case.config, case.machine, case.base, case.wishes)["tuning"]] == ["full"]


@pytest.fixture
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: None)


def kernels(tiny: str, **wishes: Any) -> tuple[set[bool], list[Refused]]:
    """Return whether the kept combinations for a CPU are fused, and what was refused."""
    cpu = find("T4").replace(kind="cpu", name="a CPU")
    kept, refused = space(settle(Question(tiny, length=64, machine=cpu, **wishes)))
    return {any(method.name == "fused" for method in choice.methods) for choice in kept}, refused


@pytest.mark.usefixtures("_compiler")
def test_a_cpu_gets_the_compiled_kernels(tiny: str) -> None:
    is_fused, refused = kernels(tiny)
    assert is_fused == {True}
    assert any(each.reason.startswith("fused kernels compute the same") for each in refused)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("wishes", [{"unwanted": ("fused",)}, {"quality": "exact"}], ids=str)
def test_who_does_not_want_the_compiled_kernels_gets_torchs(tiny: str, wishes: dict[str, Any]) -> None:
    assert kernels(tiny, **wishes)[0] == {False}


def test_without_a_compiler_there_is_no_axis_of_kernels(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "there is none")
    is_fused, refused = kernels(tiny)
    assert is_fused == {False}
    assert not any("fused" in each.reason for each in refused)


def test_what_is_asked_for_by_name_is_part_of_the_exact_run(tiny: str) -> None:
    wishes: dict[str, Any] = {"wanted": ("lora",), "unwanted": ("quantize",), "quality": "exact"}
    kept, refused = space(settle(Question(tiny, length=64, machine="H100", **wishes)))
    assert {choice["tuning"].label for choice in kept} == {"LoRA"}
    assert {choice["precision"].label for choice in kept} == {"fp32"}
    assert {choice["loss"].label for choice in kept} == {"whole loss"}
    both, _ = space(settle(Question(tiny, length=64, machine="H100", wanted=("lora", "quantize"), quality="exact")))
    assert {choice["tuning"].label for choice in both} == {"LoRA over nf4", "LoRA over int8", "LoRA, products in FP8"}
    words = " ".join(Counter(each.reason for each in refused))
    assert "bf16 mixed promises less" in words


def tunings(case: Case) -> list[str]:
    return [option.label for option in axes(case.config, case.machine, case.base, case.wishes)["tuning"]]


@pytest.mark.parametrize(
    ("machine", "has_fp8"), [("H100", True), ("RTX 4090", True), ("A100 80GB", False), ("MI300X", False)]
)
def test_products_in_fp8_are_for_the_cards_that_have_them(tiny: str, machine: str, has_fp8: bool) -> None:
    found = tunings(settle(Question(tiny, length=64, machine=machine)))
    assert ("LoRA, products in FP8" in found) is has_fp8


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(("rate", "is_offered"), [(None, False), (2e11, False), (6e11, True)])
def test_products_in_int8_are_for_a_processor_that_is_faster_at_them(
    tiny: str, rate: float | None, is_offered: bool
) -> None:
    rates = {"fp32": 1e11, "bf16": 4e11} | ({} if rate is None else {"int8": rate})
    cpu = find("T4").replace(kind="cpu", name="a CPU", flops_per_second=rates)
    assert ("LoRA, products in int8" in tunings(settle(Question(tiny, length=64, machine=cpu)))) is is_offered
    without = settle(Question(tiny, length=64, machine=cpu, unwanted=("fused",)))
    kept, _ = space(without)
    assert "LoRA, products in int8" not in {choice["tuning"].label for choice in kept}
