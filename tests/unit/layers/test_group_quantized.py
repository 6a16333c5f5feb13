"""Group quantization against the formula, and QA-LoRA over it against autograd of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from tunewise.layers.group_quantized import (
    GROUP_KINDS,
    GroupKind,
    GroupQuantizedLinear,
    pack_codes,
    quantize_groups,
    unpack_codes,
)
from tunewise.layers.qalora import QALoRALinear, group_sums

BITS = {"int4": 4, "int3": 3, "int2": 2}
IN, OUT, GROUP = 72, 10, 32  # the last group of a row has 8 inputs


def make_layer(kind: GroupKind, bias: bool = True) -> QALoRALinear:
    torch.manual_seed(0)
    base = GroupQuantizedLinear(nn.Linear(IN, OUT, bias=bias), kind, GROUP).requires_grad_(False)
    layer = QALoRALinear(base, rank=3, scale=0.7, dtype=torch.float64)
    for parameter in (layer.lora_A.weight, layer.lora_B.weight):
        nn.init.normal_(parameter)
    return layer.train()


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_codes_are_packed_without_loss_and_without_waste(kind: GroupKind) -> None:
    codes = torch.randint(0, 2 ** BITS[kind], (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, kind)
    assert packed.numel() * 8 == codes.numel() * BITS[kind]
    assert torch.equal(unpack_codes(packed, kind), codes)


def test_the_planes_of_three_bits_lie_as_documented() -> None:
    codes = torch.tensor(
        [[5, 2, 7, 0, 1, 4, 3, 6]], dtype=torch.uint8
    )  # low two bits 1 2 3 0 1 0 3 2, top bits 1 0 1 0 0 1 0 1
    assert pack_codes(codes, "int3").tolist() == [[1 + 2 * 4 + 3 * 16, 1 + 0 * 4 + 3 * 16 + 2 * 64, 1 + 4 + 32 + 128]]


@pytest.mark.parametrize("kind", GROUP_KINDS)
@pytest.mark.parametrize("in_features", [64, IN])
def test_a_weight_is_off_by_at_most_half_a_scale(kind: GroupKind, in_features: int) -> None:
    torch.manual_seed(1)
    dense = nn.Linear(in_features, OUT)
    with torch.no_grad():
        dense.weight[2] = 0.25  # all groups of a row equal: no range at all
    layer = GroupQuantizedLinear(dense, kind, GROUP)
    scale_OI = layer.scale.float().repeat_interleave(GROUP, dim=1)[:, :in_features]
    error = (layer.dense_weight(torch.float32) - dense.weight).abs()
    assert bool((error <= 0.5 * scale_OI * 1.0001 + 1e-7).all())
    assert torch.equal(layer.dense_weight(torch.float32)[2], dense.weight[2])
    ranges = torch.stack([part.amax(1) - part.amin(1) for part in dense.weight.split(GROUP, dim=1)], dim=1)
    exact = ranges / (2 ** BITS[kind] - 1)
    assert bool((layer.scale.float() >= exact).all())
    assert torch.allclose(layer.scale.float(), exact, rtol=2**-7)


def test_the_bits_of_a_weight_are_those_that_the_module_says() -> None:
    layer = GroupQuantizedLinear(nn.Linear(128, 16, bias=False), "int4", 32)
    assert layer.stored_bytes * 8 / (128 * 16) == 5.5
    with FakeTensorMode():
        fake = GroupQuantizedLinear(nn.Linear(128, 16, bias=False), "int4", 32)
        assert fake.stored_bytes == layer.stored_bytes
        assert fake(torch.zeros(3, 128)).shape == (3, 16)


def test_a_transposed_layer_comes_back_transposed() -> None:
    torch.manual_seed(0)
    conv = Conv1D(OUT, IN)
    layer = GroupQuantizedLinear(conv, "int4", GROUP)
    back = layer.to_dense(torch.float32)
    assert isinstance(back, Conv1D)
    input = torch.randn(3, IN)
    assert torch.allclose(back(input), layer(input), atol=1e-6)


def plain(layer: QALoRALinear, input: Tensor, a_RG: Tensor, b_OR: Tensor) -> Tensor:
    """The update as a dense matrix: B A, each column repeated over its group."""
    update_OI = (b_OR @ a_RG).repeat_interleave(GROUP, dim=1)[:, :IN] * (0.7 * IN / GROUP**2)
    return nn.functional.linear(input, layer.base_layer.dense_weight(torch.float64) + update_OI, layer.base_layer.bias)


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_the_layer_is_the_plain_formula(kind: GroupKind) -> None:
    layer = make_layer(kind).double()
    input = torch.randn(2, 4, IN, dtype=torch.float64, requires_grad=True)
    a_RG, b_OR = (factor.weight.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B))
    expected = plain(layer, input, a_RG, b_OR)
    wanted = torch.autograd.grad(expected.square().sum(), (input, a_RG, b_OR))
    output = layer(input)
    found = torch.autograd.grad(output.square().sum(), (input, layer.lora_A.weight, layer.lora_B.weight))
    assert torch.allclose(output, expected, rtol=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_the_merged_layer_has_the_same_codes_and_computes_the_same(kind: GroupKind) -> None:
    layer = make_layer(kind).float().eval()
    input = torch.randn(50, IN)
    merged = layer.merge()
    assert torch.equal(merged.packed, layer.base_layer.packed)
    assert torch.equal(merged.scale, layer.base_layer.scale)
    assert not torch.equal(merged.offset, layer.base_layer.offset)
    unmerged = layer(input)
    assert float((merged(input) - unmerged).abs().max() / unmerged.abs().max()) < 1e-5


def test_sums_of_groups() -> None:
    assert group_sums(torch.arange(10.0), 4).tolist() == [6.0, 22.0, 17.0]
    codes, scale, offset = quantize_groups(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2, 4)
    assert (codes.tolist(), scale.tolist(), offset.tolist()) == ([[0, 1, 2, 3]], [[1.0]], [[0.0]])
