"""DoRA, LoRA-FA and LoftQ against autograd of their plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tunewise.errors import InputError
from tunewise.layers.dora import DoRALinear
from tunewise.layers.loftq import start_from_quantization_error
from tunewise.layers.lora import LoRALinear
from tunewise.layers.lora_fa import LoRAFALinear
from tunewise.layers.quantized import quantize_linear

IN, OUT, RANK, SCALE = 12, 9, 3, 0.8


def base_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT).double()
    return (dense if kind == "dense" else quantize_linear(dense, "int8")).double().requires_grad_(False)


def dense_of(base: nn.Module) -> Tensor:
    return base.weight.detach() if isinstance(base, nn.Linear) else base.dense_weight(torch.float64)  # type: ignore[operator]


def randomize(layer: LoRALinear) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter is layer.lora_A.weight or parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_dora_is_the_plain_formula(kind: str) -> None:
    base = base_of(kind)
    layer = DoRALinear(base, RANK, SCALE, dtype=torch.float64).train()
    layer.initialize("kaiming", torch.Generator().manual_seed(0))
    input = torch.randn(2, 5, IN, dtype=torch.float64)
    assert torch.allclose(layer(input), base(input), rtol=1e-9)  # it starts as its base
    randomize(layer)
    x, a_RI, b_OR, m_O = leaves(input, layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    adapted_OI = dense_of(base) + SCALE * b_OR @ a_RI
    weight_OI = m_O[:, None] * adapted_OI / adapted_OI.detach().norm(dim=1, keepdim=True)
    expected = nn.functional.linear(x, weight_OI, base.bias)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(expected.square().sum(), (x, a_RI, b_OR, m_O))
    (ours,) = leaves(input)
    output = layer(ours)
    parameters = (layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    found = torch.autograd.grad(output.square().sum(), (ours, *parameters))
    assert torch.allclose(output, expected, rtol=1e-9)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-9)
    assert torch.allclose(layer.merged_weight(), weight_OI, rtol=1e-6)
    assert torch.allclose(layer.merge(torch.float64)(input), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "int8"])
@pytest.mark.parametrize("in_place", [True, False])
def test_lora_fa_is_the_plain_formula_for_b_and_the_input(kind: str, in_place: bool) -> None:
    base = base_of(kind)
    layer = LoRAFALinear(base, RANK, SCALE, dtype=torch.float64).train()
    layer.initialize("kaiming", torch.Generator().manual_seed(0))
    layer.in_place = in_place
    randomize(layer)
    input = torch.randn(2, 5, IN, dtype=torch.float64)
    x, b_OR = leaves(input, layer.lora_B.weight)
    a_RI = layer.lora_A.weight.detach()
    expected = nn.functional.linear(x, dense_of(base) + SCALE * b_OR @ a_RI, base.bias)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(expected.square().sum(), (x, b_OR))
    (ours,) = leaves(input)
    output = layer(ours)
    found = torch.autograd.grad(output.square().sum(), (ours, layer.lora_B.weight))
    assert torch.allclose(output, expected, rtol=1e-9)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9)
    assert not layer.lora_A.weight.requires_grad


def test_lora_fa_keeps_rank_numbers_a_token_and_not_the_input() -> None:
    kept: dict[str, int] = {}
    for kind in (LoRALinear, LoRAFALinear):
        layer = kind(base_of("dense").float(), RANK, SCALE)
        layer.initialize("kaiming", torch.Generator().manual_seed(0))
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        input = torch.randn(40, IN, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(input)
        kept[kind.__name__] = sum(sizes) - layer.lora_A.weight.numel() - layer.lora_B.weight.numel()
    assert kept == {"LoRALinear": 40 * IN, "LoRAFALinear": 40 * RANK}


def test_loftq_makes_up_for_what_quantization_lost_and_the_full_rank_for_all_of_it() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    packed = quantize_linear(dense, "nf4")
    errors = []
    for rank in (1, 4, 16, 32):
        layer = LoRALinear(packed, rank, SCALE)
        start_from_quantization_error(layer, dense.weight.detach())
        errors.append(float((layer.merged_weight() - dense.weight).norm()))
    lost = float((packed.dense_weight(torch.float32) - dense.weight).norm())
    assert lost > errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-5 * float(dense.weight.norm())
    best = torch.linalg.svdvals(dense.weight - packed.dense_weight(torch.float32))
    assert errors[1] == pytest.approx(float(best[4:].norm()), rel=1e-4)  # no update of rank 4 comes nearer
    with pytest.raises(InputError, match="rank of at most 32"):
        start_from_quantization_error(LoRALinear(packed, 33, SCALE), dense.weight.detach())
