"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199) as peft computes it under transformers 5.23: zero-initialized,
gated prompts in the top layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from tests.unit.architectures import tiny_model
from tests.unit.methods.adapted import logits, make_recipe, make_run, token_ids
from tunewise.errors import InputError
from tunewise.methods import Packing, Peft, Quantize
from tunewise.methods.compatibility import conflicts

pytest.importorskip("peft")

OPTIONS = {"adapter_len": 4, "adapter_layers": 1}


def adapted(architecture: str = "llama") -> nn.Module:
    return make_run(tiny_model(architecture), Peft(kind="ADAPTION_PROMPT", options=OPTIONS)).model


def adapted_attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "adaption_gate")]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_at_the_first_step_the_logits_are_the_base_s_and_only_gates_move_them(architecture: str) -> None:
    model = adapted(architecture)
    assert torch.equal(logits(model), logits(tiny_model(architecture)))
    (attention,) = adapted_attentions(model)
    with torch.no_grad():
        attention.adaption_gate.fill_(0.5)
    assert not torch.allclose(logits(model), logits(tiny_model(architecture)), atol=1e-3)


def test_only_the_top_layers_have_prompts_and_the_gate_learns_first() -> None:
    model = adapted()
    (attention,) = adapted_attentions(model)
    assert model.get_submodule("base_model.model.model.layers.1.self_attn") is attention  # of two layers the last
    model(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
    gradients = {name.rpartition("_")[2]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert bool(gradients["gate"].any())
    assert not gradients["prompt"].any()  # behind a gate of zero


def gated(attention: Any, hidden_RLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The paper's equations 3 to 6: a softmax of its own over the prompts, times the gate."""
    inner = attention.model
    rows, length, _ = hidden_RLD.shape
    heads, width = inner.config.num_attention_heads, inner.head_dim
    query = inner.q_proj(hidden_RLD).view(rows, length, heads, width).transpose(1, 2)
    query = query * cos[:, None] + rotate_half(query) * sin[:, None]
    groups = heads // inner.config.num_key_value_heads
    key, value = (
        project(attention.adaption_prompt)[0].view(4, -1, width).transpose(0, 1).repeat_interleave(groups, dim=0)
        for project in (inner.k_proj, inner.v_proj)
    )
    weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(width), dim=-1)
    output = (attention.adaption_gate * weights) @ value
    projected: Tensor = inner.o_proj(output.transpose(1, 2).reshape(rows, length, -1))
    return projected


def test_the_layer_is_the_plain_formula() -> None:
    model = adapted()
    (attention,) = adapted_attentions(model)
    with torch.no_grad():
        attention.adaption_gate.fill_(0.7)
    seen: dict[str, Any] = {}

    def look(module: nn.Module, arguments: Any, named: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        seen.update(named, output=output[0])

    attention.register_forward_hook(look, with_kwargs=True)
    logits(model)
    expected = attention.model(**{k: v for k, v in seen.items() if k != "output"})[0]
    expected = expected + gated(attention, seen["hidden_states"], *seen["position_embeddings"])
    assert torch.allclose(seen["output"], expected, rtol=1e-5, atol=1e-5)


def test_where_the_library_has_it_not() -> None:
    with pytest.raises(InputError, match="Unsupported model type"):
        adapted("qwen3")
    method = Peft(kind="ADAPTION_PROMPT", options=OPTIONS)
    assert "cannot wrap quantized layers" in conflicts(make_recipe(method, Quantize()))[0]
    assert not conflicts(make_recipe(method, Packing()))  # prompts belong to every position: packed rows are fine
