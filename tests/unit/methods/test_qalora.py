"""QA-LoRA as a method: the whole line, and a merged model that is still quantized and still the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.architectures import tiny_model
from tests.unit.methods.adapted import disturb, make_recipe, make_run
from tests.unit.methods.adapted import logits as adapted_logits
from tests.unit.tiny_runs import logits, recipe_over, relative_error, save_model, write_records
from tunewise import api, load_quantized
from tunewise.engine.finished import open_finished
from tunewise.errors import Conflict, InputError
from tunewise.export.adapter import load_adapter, save_adapter
from tunewise.layers.group_quantized import GROUP_KINDS
from tunewise.methods import LoRA, QALoRA, Quantize
from tunewise.methods.compatibility import conflicts


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("qalora")
    return recipe_over(save_model(folder / "model"), write_records(folder / "records.jsonl"))


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_the_merged_model_is_quantized_and_computes_what_was_trained(
    recipe: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    methods = {"quantize": {"kind": kind, "block_size": 32}, "qalora": {"rank": 4}, "precision": {"compute": "fp32"}}
    result = api.train({**recipe, "methods": methods}, out=tmp_path / "run")
    run = open_finished(tmp_path / "run", "read").run
    expected = logits(run.model)
    saved = api.export_merged(tmp_path / "run", tmp_path / "m")
    assert saved.max_difference == 0.0
    merged = load_quantized(tmp_path / "m")
    assert relative_error(logits(merged), expected) < 1e-5
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    packed = [name for name in tensors if name.endswith(".packed")]
    assert len(packed) == 14
    assert not {name.removesuffix("packed") + "weight" for name in packed} & tensors.keys()
    config = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert config["use_qalora"] is True
    assert config["qalora_group_size"] == 32


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "opt"])
def test_the_adapter_is_saved_and_read_again(architecture: str, tmp_path: Path) -> None:
    methods = (Quantize(kind="int4", block_size=32), QALoRA(rank=4))
    run = make_run(tiny_model(architecture), *methods)
    disturb(run.model)
    expected = adapted_logits(run.model)
    save_adapter(run.model, QALoRA(rank=4), tmp_path, "base")
    again = make_run(tiny_model(architecture), *methods)
    load_adapter(again.model, tmp_path)
    assert torch.equal(adapted_logits(again.model), expected)
    with pytest.raises(InputError, match="QA-LoRA needs the quantized base"):
        load_adapter(tiny_model(architecture), tmp_path)
    with pytest.raises(InputError, match="'use_qalora' is true of one of"):
        load_adapter(make_run(tiny_model(architecture), LoRA(rank=4)).model, tmp_path)


def test_at_the_first_step_the_logits_are_the_base_s() -> None:
    quantized = make_run(tiny_model("llama"), Quantize(kind="int2"), LoRA(rank=2))
    adapted = make_run(tiny_model("llama"), Quantize(kind="int2"), QALoRA(rank=2))
    assert torch.equal(adapted_logits(quantized.model), adapted_logits(adapted.model))


def test_conflicts_and_errors(tmp_path: Path) -> None:
    for methods in ((QALoRA(),), (QALoRA(), Quantize(kind="nf4"))):
        assert "qalora adapts groups of integers" in conflicts(make_recipe(*methods))[0]
    with pytest.raises(Conflict, match="is not quantized, so it has no groups"):
        make_run(tiny_model("llama"), Quantize(kind="int4", skip_modules=("lm_head", "o_proj")), QALoRA())
    with pytest.raises(ValueError, match="int3 keeps its scales"):
        Quantize(kind="int3", double_quant=True)
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="only 'tunewise-groups' is read here"):
        load_quantized(tmp_path)
