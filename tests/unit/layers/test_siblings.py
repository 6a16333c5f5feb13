"""LoRA siblings and the gated MLP against the composed layers, loss and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tunewise.layers import native
from tunewise.layers.lora import LoRALinear, lora_linear_reference
from tunewise.layers.quantized import quantize_linear
from tunewise.layers.siblings import are_plain_lora, gated_mlp, siblings

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")

BASES = ("linear", "without bias", "int8")
WIDE, NARROW = 24, 16


def layer(inputs: int, outputs: int, rank: int, base: str, seed: int, dtype: torch.dtype = torch.float32) -> LoRALinear:
    torch.manual_seed(seed)
    dense: nn.Module = nn.Linear(inputs, outputs, bias=base == "linear").requires_grad_(False).to(dtype)
    made = LoRALinear(quantize_linear(dense, "int8") if base == "int8" else dense, rank, scale=1.5)
    nn.init.normal_(made.lora_A.weight)
    nn.init.normal_(made.lora_B.weight)
    return made


def plain(each: LoRALinear, input: Tensor) -> Tensor:
    return lora_linear_reference(input, each.base_layer, each.lora_A.weight, each.lora_B.weight, each.scale)


def assert_same(ours: list[Tensor], truth: list[Tensor], tolerance: float = 2e-6) -> None:
    for number, (mine, right) in enumerate(zip(ours, truth, strict=True)):
        error = float((mine.double() - right.double()).norm() / right.double().norm())
        assert error < tolerance, f"{number}: off by {error:.1e}"
        assert mine.is_contiguous()


def factors(layers: list[LoRALinear]) -> list[Tensor]:
    return [parameter for each in layers for parameter in (each.lora_A.weight, each.lora_B.weight)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("needs_input", [True, False])
def test_siblings(base: str, needs_input: bool) -> None:
    layers = [layer(WIDE, outputs, rank, base, n) for n, (outputs, rank) in enumerate([(40, 4), (8, 4), (8, 2)])]
    x = torch.randn(2, 5, WIDE).requires_grad_(needs_input)
    learnt = [*([x] if needs_input else []), *factors(layers)]
    outputs = siblings(x, layers)
    expected = [plain(each, x) for each in layers]
    weights = [torch.randn_like(output) for output in expected]
    gradients = [
        list(torch.autograd.grad([(o * w).sum() for o, w in zip(found, weights, strict=True)], learnt))
        for found in (outputs, expected)
    ]
    assert_same([o.detach() for o in outputs], [e.detach() for e in expected])
    assert_same(gradients[0], gradients[1])


@pytest.mark.parametrize("base", BASES)
def test_gated_mlp(base: str) -> None:
    gate, up = (layer(NARROW, WIDE, 3, base, seed) for seed in (0, 1))
    down = layer(WIDE, NARROW, 2, base, 2)
    x = torch.randn(7, NARROW, requires_grad=True)
    learnt = [x, *factors([gate, up, down])]
    output = gated_mlp(x, gate, up, down)
    expected = plain(down, nn.functional.silu(plain(gate, x)) * plain(up, x))
    weight = torch.randn_like(expected)
    ours, truth = (list(torch.autograd.grad((each * weight).sum(), learnt)) for each in (output, expected))
    assert_same([output.detach(), *ours], [expected.detach(), *truth])


def test_in_bf16_over_fp32_factors() -> None:
    gate, up = (layer(NARROW, WIDE, 3, "linear", seed, torch.bfloat16) for seed in (0, 1))
    down = layer(WIDE, NARROW, 2, "linear", 2, torch.bfloat16)
    x = torch.randn(7, NARROW).bfloat16().requires_grad_(True)
    learnt = [x, *factors([gate, up, down])]
    output = gated_mlp(x, gate, up, down)
    expected = plain(down, nn.functional.silu(plain(gate, x)) * plain(up, x))
    ours, truth = (list(torch.autograd.grad(each.float().sum(), learnt)) for each in (output, expected))
    assert_same([output.detach(), *ours], [expected.detach(), *truth], 3e-2)
    assert [gradient.dtype for gradient in ours] == [parameter.dtype for parameter in learnt]


def test_other_layers_are_called_one_by_one() -> None:
    dropping = layer(NARROW, WIDE, 3, "linear", 0)
    dropping.dropout = 0.5
    trained = layer(NARROW, WIDE, 3, "linear", 1)
    trained.base_layer.requires_grad_(True)
    kept = layer(NARROW, WIDE, 3, "linear", 2)
    kept.in_place = False
    dense = nn.Linear(NARROW, WIDE)
    for other in (dropping, trained, kept, dense):
        assert not are_plain_lora([layer(NARROW, WIDE, 3, "linear", 3), other])
    x = torch.randn(4, NARROW)
    gate, up, down = dense, nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW)
    expected = down(nn.functional.silu(gate(x)) * up(x))
    assert torch.allclose(gated_mlp(x, gate, up, down), expected, atol=1e-5)
    assert are_plain_lora([dropping.eval()])
