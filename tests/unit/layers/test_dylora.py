"""The DyLoRA layer against autograd of the plain formula, at every rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tunewise.layers.dylora import DyLoRALinear, cut_dylora
from tunewise.layers.lora import LoRALinear
from tunewise.layers.quantized import quantize_linear

RANK, ALPHA = 6, 9.0


def bias_of(layer: DyLoRALinear) -> Tensor:
    bias = layer.base_layer.bias
    assert isinstance(bias, Tensor)
    return bias


def make_layer(base: nn.Module | None = None, scale_by_rank: bool = True) -> DyLoRALinear:
    torch.manual_seed(0)
    base = (base or nn.Linear(10, 7)).double().requires_grad_(False)
    layer = DyLoRALinear(base, RANK, ALPHA, scale_by_rank, dtype=torch.float64).train()
    for parameter in (layer.lora_A.weight, layer.lora_B.weight):
        nn.init.normal_(parameter)
    return layer


def plain(
    layer: DyLoRALinear, weight_OI: Tensor, input: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output and the gradients of A and B, with the update as a dense matrix."""
    a_RI, b_OR = (w.weight.detach().clone().requires_grad_() for w in (layer.lora_A, layer.lora_B))
    mask_R = (torch.arange(RANK) < rank).double()
    output = nn.functional.linear(input, weight_OI + scale * (b_OR * mask_R) @ a_RI, bias_of(layer))
    output.square().sum().backward()
    assert a_RI.grad is not None
    assert b_OR.grad is not None
    return output, a_RI.grad, b_OR.grad


@pytest.mark.parametrize("rank", range(1, RANK + 1))
@pytest.mark.parametrize("scale_by_rank", [True, False])
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_each_rank_is_the_plain_formula(rank: int, scale_by_rank: bool, kind: str) -> None:
    dense = nn.Linear(10, 7).double()
    base = dense if kind == "dense" else quantize_linear(dense, "int8")
    layer = make_layer(base, scale_by_rank)
    weight_OI = dense.weight.detach() if kind == "dense" else base.dense_weight(torch.float64)  # type: ignore[operator]
    layer.active_rank = rank
    input = torch.randn(3, 4, 10, dtype=torch.float64)
    scale = ALPHA / (rank if scale_by_rank else RANK)
    expected, grad_A, grad_B = plain(layer, weight_OI, input, rank, scale)
    output = layer(input)
    output.square().sum().backward()
    assert torch.allclose(output, expected, rtol=1e-9)
    for found, wanted in ((layer.lora_A.weight.grad, grad_A), (layer.lora_B.weight.grad, grad_B)):
        assert found is not None
        assert torch.allclose(found, wanted, rtol=1e-9)
    assert not layer.lora_A.weight.grad[rank:].any()  # type: ignore[index]
    assert not layer.lora_B.weight.grad[:, rank:].any()  # type: ignore[index]


def test_evaluation_uses_the_largest_rank() -> None:
    layer, input = make_layer(), torch.randn(3, 10, dtype=torch.float64)
    layer.active_rank = 2
    drawn = layer(input)
    full = layer.eval()(input)
    assert not torch.allclose(drawn, full)
    assert torch.allclose(full, plain(layer, layer.weight, input, RANK, ALPHA / RANK)[0], rtol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, RANK])
def test_a_cut_layer_computes_what_training_at_that_rank_computed(rank: int) -> None:
    layer, input = make_layer(), torch.randn(3, 10, dtype=torch.float64)
    layer.active_rank = rank
    model = nn.Sequential(layer)
    expected = model(input)
    cut_dylora(model, rank)
    cut = model[0]
    assert type(cut) is LoRALinear
    assert torch.allclose(model(input), expected, rtol=1e-9)
    assert torch.allclose(cut.merge()(input), expected, rtol=1e-6)
