"""Several methods of adding, choosing and reparameterizing parameters in one run (Delta Tuning's three families)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.architectures import tiny_model
from tests.unit.methods.adapted import disturb, make_recipe, make_run, token_ids
from tests.unit.methods.adapted import logits as eval_logits
from tests.unit.tiny_runs import (
    assert_same_end,
    logits,
    recipe_over,
    save_model,
    train_interrupted,
    write_records,
)
from tunewise import api, load_adapter
from tunewise.engine.finished import open_finished
from tunewise.errors import InputError
from tunewise.export.parameters import load_parameters, save_parameters
from tunewise.layers.bottleneck import Bottleneck, bottlenecks
from tunewise.methods import BottleneckAdapter, Freeze, LoRA, Peft, Quantize
from tunewise.methods.compatibility import conflicts
from tunewise.methods.reading import load_recipe
from tunewise.workload.model import load_config, load_model

PROMPT = {"peft": {"kind": "PROMPT_TUNING", "options": {"num_virtual_tokens": 4}}}
PREFIX = {"peft": {"kind": "PREFIX_TUNING", "options": {"num_virtual_tokens": 4}}}
BITFIT = {"freeze": {"train": ["*.bias"]}}
NORMS = {"freeze": {"train": ["*norm*"]}}
LORA_PLUS = {"lora": {"rank": 4, "lora_plus_ratio": 4.0}}
STACKS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "lora+bitfit+prompt": (
        "qwen2",
        {**LORA_PLUS, **BITFIT, **PROMPT},
        {"lora", "peft"},
    ),
    "adapter": ("llama", {"bottleneck": {"size": 8}}, set()),
    "adapter+bitfit": ("qwen2", {"bottleneck": {"size": 8}, **BITFIT}, set()),
    "norms over int8": ("llama", {"quantize": {"kind": "int8"}, **NORMS}, set()),
    "adapter+lora+norms": ("llama", {"bottleneck": {"size": 8}, "lora": {"rank": 4}, **NORMS}, {"lora", "parameters"}),
    "adapter+bitfit+prefix": ("qwen2", {"bottleneck": {"size": 8}, **BITFIT, **PREFIX}, {"parameters", "peft"}),
    "adapter+dora+prompt": ("llama", {"bottleneck": {}, "dora": {"rank": 4}, **PROMPT}, {"lora", "parameters", "peft"}),
}


def base_of(run: Path) -> nn.Module:
    spec = load_recipe(run / "recipe.yaml").model
    model: nn.Module = load_model(spec, load_config(spec), torch.float32, seed=0)
    return model


def shown(model: nn.Module) -> torch.Tensor:
    """Prompts come out in front: compare the last positions."""
    return logits(model)[-24:]


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_is_trained_resumed_saved_and_read_with_equal_logits(stack: str, tmp_path: Path) -> None:
    architecture, methods, parts = STACKS[stack]
    pytest.importorskip("peft")
    model = save_model(tmp_path / "model", architecture)
    recipe = recipe_over(model, write_records(tmp_path / "records.jsonl"), training={"steps": 4})
    recipe["methods"] = {**methods, "precision": {"compute": "fp32"}}
    whole = api.train(recipe, out=tmp_path / "whole")
    assert {path.name for path in whole.saved.folder.iterdir() if path.is_dir()} == parts
    train_interrupted(recipe, tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    run = open_finished(tmp_path / "whole", "read").run
    expected = shown(run.model)
    base = base_of(whole.folder)
    if "quantize" in methods:
        base = make_run(base, Quantize(kind="int8"), Freeze(train=("*norm*",))).model
    assert torch.allclose(shown(load_adapter(base, whole.saved.folder)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(shown(base_of(whole.folder)), expected, rtol=1e-3, atol=1e-3)


def test_peft_reads_its_parts_one_after_the_other(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = save_model(tmp_path / "model", "llama")
    recipe = recipe_over(model, write_records(tmp_path / "records.jsonl"), training={"steps": 3})
    recipe["methods"] = {"lora": {"rank": 4}, **PROMPT, "precision": {"compute": "fp32"}}
    saved = api.train(recipe, out=tmp_path / "run").saved
    run = open_finished(tmp_path / "run", "read").run
    merged = peft.PeftModel.from_pretrained(base_of(tmp_path / "run"), saved.folder / "lora").merge_and_unload()
    theirs = peft.PeftModel.from_pretrained(merged, saved.folder / "peft")
    assert torch.allclose(shown(theirs), shown(run.model), rtol=1e-4, atol=1e-4)


def test_lora_plus_keeps_its_ratio_inside_peft_s_wrapper() -> None:
    pytest.importorskip("peft")
    prompts = Peft(kind="PROMPT_TUNING", options={"num_virtual_tokens": 4})
    run = make_run(tiny_model("llama"), LoRA(rank=2, lora_plus_ratio=7.0), Freeze(train=("*norm*",)), prompts)
    names = {name for name, _ in run.trainable()}
    assert set(run.learning_rate_factors) == {name for name in names if "lora_B" in name}
    assert sum("norm" in name for name in names) == 5
    assert sum("prompt" in name for name in names) == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "phi", "falcon", "mixtral"])
def test_bottlenecks_start_as_the_base_and_are_saved_and_read(architecture: str, tmp_path: Path) -> None:
    method = BottleneckAdapter(size=8)
    run = make_run(tiny_model(architecture), method)
    assert torch.equal(eval_logits(run.model), eval_logits(tiny_model(architecture)))
    run.model.train()(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
    disturb(run.model)
    expected = eval_logits(run.model)
    save_parameters(run.model, [name for name, _ in run.trainable()], method, tmp_path, "base")
    again = tiny_model(architecture)
    load_parameters(again, tmp_path)
    assert torch.equal(eval_logits(again), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_adapter_is_the_plain_formula(activation: Any) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5).double().requires_grad_(False)
    layer = Bottleneck(base, 5, 3, activation, 0.5, torch.float64)
    with torch.no_grad():
        for parameter in (*layer.adapter_down.parameters(), *layer.adapter_up.parameters()):
            parameter.normal_()
    input = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    down, up = layer.adapter_down, layer.adapter_up
    hidden = input @ base.weight.T + base.bias
    functions = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}
    low = functions[activation](hidden @ down.weight.T + down.bias)
    expected = hidden + 0.5 * (low @ up.weight.T + up.bias)
    parameters = (input, down.weight, down.bias, up.weight, up.bias)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    found = torch.autograd.grad(layer(input).square().sum(), parameters)
    assert torch.allclose(layer(input), expected)
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_where_adapters_stand() -> None:
    run = make_run(tiny_model("llama"), Quantize(kind="int8"), LoRA(rank=2), BottleneckAdapter(after=("mlp",)))
    assert list(bottlenecks(run.model)) == [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    run = make_run(tiny_model("llama"), BottleneckAdapter(target_modules=("up_proj",)))
    assert list(bottlenecks(run.model)) == [f"model.layers.{number}.mlp.up_proj" for number in range(2)]


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter"):
        load_adapter(tiny_model("llama"), tmp_path)
    method = BottleneckAdapter(size=8)
    run = make_run(tiny_model("llama"), method)
    save_parameters(run.model, [name for name, _ in run.trainable()], method, tmp_path, "base")
    with pytest.raises(InputError, match="has no linear layer"):
        load_adapter(tiny_model("gpt2"), tmp_path)
    other = json.loads((tmp_path / "adapter_config.json").read_text())
    other["bottleneck"]["size"] = 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="has the shape"):
        load_adapter(tiny_model("llama"), tmp_path)
    assert "both wrap the same layers" in conflicts(make_recipe(method, Peft(kind="IA3")))[0]
