"""What packing sets, and with which models it would mix documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.architectures import tiny_model
from tests.unit.built import make_recipe, make_run
from tunewise.errors import Conflict
from tunewise.methods.packing import Packing
from tunewise.workload.batches import Layout


def test_sets_the_layout() -> None:
    run = make_run(tiny_model("llama"), Packing(row_tokens=64, pad_to=8))
    assert run.layout == Layout(micro_batch_size=4, row_tokens=64, pad_to=8)
    assert Packing(row_tokens=64).conflict(make_recipe()) is None


def test_an_incomplete_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="complete"):
        make_run(tiny_model("llama"), Packing())


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "jamba", "recurrent_gemma", "lfm2"])
def test_models_that_carry_state_are_refused(model_type: str) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 32,
    }
    if model_type == "lfm2":
        sizes["layer_types"] = ["conv", "full_attention"] * 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    with pytest.raises(Conflict, match="carry state"):
        make_run(model, Packing(row_tokens=64))
