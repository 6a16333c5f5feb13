"""DoRA, LoRA-FA and LoftQ as methods: files that peft reads, resumption, conflicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.architectures import tiny_model
from tests.unit.methods.adapted import disturb, logits, make_recipe, make_run
from tests.unit.tiny_runs import assert_same_end, recipe_over, save_model, train_interrupted, write_records
from tunewise import api
from tunewise.errors import InputError
from tunewise.export.adapter import load_adapter, save_adapter
from tunewise.layers.dora import DoRALinear
from tunewise.layers.lora import lora_layers
from tunewise.methods import DoRA, LoRA, LoRAFA, Quantize
from tunewise.methods.compatibility import conflicts
from tunewise.methods.low_rank import LowRank


@pytest.mark.parametrize("method", [DoRA(rank=3), LoRAFA(rank=3)], ids=lambda method: method.name)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi"])
def test_peft_and_tunewise_read_the_adapter(method: LowRank, architecture: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = make_run(tiny_model(architecture), method)
    assert torch.allclose(logits(run.model), logits(tiny_model(architecture)), atol=1e-5)
    disturb(run.model)
    expected = logits(run.model)
    save_adapter(run.model, method, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    assert torch.allclose(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    ours = tiny_model(architecture)
    load_adapter(ours, tmp_path)
    assert torch.allclose(logits(ours), expected, rtol=1e-5, atol=1e-5)
    again = make_run(tiny_model(architecture), method, seed=5)
    load_adapter(again.model, tmp_path)
    assert torch.equal(logits(again.model), expected)


def test_a_dora_of_peft_trains_as_ours_does() -> None:
    peft = pytest.importorskip("peft")
    run = make_run(tiny_model("llama"), DoRA(rank=3, alpha=6))
    disturb(run.model)
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        for name, layer in lora_layers(run.model).items():
            assert isinstance(layer, DoRALinear)
            other = theirs.base_model.model.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.lora_A.weight)
            other.lora_B["default"].weight.copy_(layer.lora_B.weight)
            other.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude_vector)
    for model in (run.model, theirs):
        model.train()(input_ids=torch.arange(3, 12)[None], use_cache=False).logits.square().mean().backward()
    for name, layer in lora_layers(run.model).items():
        assert isinstance(layer, DoRALinear)
        other = theirs.base_model.model.get_submodule(name)
        for ours, peft_s in (
            (layer.lora_A.weight, other.lora_A["default"].weight),
            (layer.lora_B.weight, other.lora_B["default"].weight),
            (layer.lora_magnitude_vector, other.lora_magnitude_vector["default"].weight),
        ):
            assert float((ours.grad - peft_s.grad).norm()) < 1e-4 * float(peft_s.grad.norm())


def test_dora_and_lora_are_not_taken_for_each_other(tmp_path: Path) -> None:
    run = make_run(tiny_model("llama"), DoRA(rank=3))
    save_adapter(run.model, DoRA(rank=3), tmp_path, "base")
    with pytest.raises(InputError, match="'use_dora' is true of one of adapter and model only"):
        load_adapter(make_run(tiny_model("llama"), LoRA(rank=3)).model, tmp_path)


def test_lora_fa_trains_b_alone() -> None:
    run = make_run(tiny_model("llama"), LoRAFA(rank=3))
    assert all(name.endswith("lora_B.weight") for name, _ in run.trainable())


@pytest.mark.parametrize(
    "methods",
    [
        {"lora_fa": {"rank": 4}},
        {"dora": {"rank": 4}},
        {"quantize": {"kind": "nf4"}, "lora": {"init": "loftq", "rank": 4}},
    ],
    ids=lambda methods: "+".join(methods),
)
def test_the_whole_line_with_a_resumption_and_a_merged_model(methods: dict[str, Any], tmp_path: Path) -> None:
    base = recipe_over(save_model(tmp_path / "model"), write_records(tmp_path / "records.jsonl"))
    recipe = {**base, "methods": {**methods, "precision": {"compute": "fp32"}}}
    api.train(recipe, out=tmp_path / "whole")
    train_interrupted(recipe, tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert api.export_merged(tmp_path / "whole", tmp_path / "merged").max_difference < 1e-4


def test_loftq_is_nearer_to_the_base_than_plain_quantization() -> None:
    expected = logits(tiny_model("llama"))
    plain = logits(make_run(tiny_model("llama"), Quantize(kind="nf4"), LoRA(rank=8)).model)
    run = make_run(tiny_model("llama"), Quantize(kind="nf4"), LoRA(rank=8, init="loftq"))
    assert not run.original_weights
    assert float((logits(run.model) - expected).norm()) < 0.8 * float((plain - expected).norm())


def test_conflicts() -> None:
    assert "there is none" in conflicts(make_recipe(LoRA(init="loftq")))[0]
    assert "low-rank updates of the same layers" in conflicts(make_recipe(DoRA(), LoRAFA()))[0]
