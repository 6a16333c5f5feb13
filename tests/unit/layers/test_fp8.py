"""Products in FP8: torch's operation against the plain twin, the layers against the dense formula, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tunewise.layers.fp8 import DTYPE, matmul, plain_matmul, quantize_rows
from tunewise.layers.fp8_linear import Fp8ProductLinear
from tunewise.layers.lora import LoRALinear
from tunewise.layers.narrow_linear import unpacked_products
from tunewise.layers.quantized import Fp8Linear
from tunewise.layers.siblings import siblings

SHAPES = [(1, 16, 16), (5, 3, 7), (33, 64, 48), (130, 577, 65)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_rows_are_rounded_by_at_most_a_sixteenth_of_each_number() -> None:
    x_MK, col_scale_K = drawn(9, 33), drawn(33, seed=2).abs()
    x_MK[3] = 0.0
    rows_MK, scale_M = quantize_rows(x_MK, col_scale_K)
    exact = x_MK * col_scale_K
    assert rows_MK.dtype == DTYPE
    assert torch.equal(rows_MK.float().abs().amax(dim=1) == 448, exact.abs().amax(dim=1) > 0)
    error = (rows_MK.float() * scale_M[:, None] - exact).abs()
    # Half of the last of three bits, or below the normal numbers half of the smallest one.
    assert (error <= (exact.abs() / 16).maximum(scale_M[:, None] * 2**-10) * 1.0001).all()
    assert float(scale_M[3]) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_comes_out_as_not_a_number(bad: float) -> None:
    x_MK = drawn(3, 40)
    x_MK[1, 17] = bad
    product = matmul(quantize_rows(x_MK), quantize_rows(drawn(5, 40, seed=1))[0], None, torch.float32)
    assert product[1].isnan().all()
    assert product[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_against_its_twin(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    rows, col_scale_N = quantize_rows(drawn(m, k).to(dtype)), drawn(n, seed=3).abs()
    weight_NK = quantize_rows(drawn(n, k, seed=1))[0]
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for by_columns in (False, True):
        weight = weight_NK.t().contiguous() if by_columns else weight_NK
        for scale in (col_scale_N, None):
            ours, twin = (made(rows, weight, scale, dtype, by_columns=by_columns) for made in (matmul, plain_matmul))
            assert ours.dtype == dtype
            assert float((ours.float() - twin.float()).abs().max()) <= tolerance * float(twin.float().abs().max())


def test_a_weight_is_stored_in_a_byte_each_and_unpacked_near_itself() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(300, 200)
    packed = Fp8Linear(dense)
    assert packed.stored_bytes == 300 * 200 + 4 * 200
    assert 0.01 < relative_error(packed.dense_weight(torch.float32), dense.weight.detach()) < 0.03
    assert packed.kind == "fp8"


def make_layer(inputs: int, outputs: int, bias: bool = False) -> Fp8ProductLinear:
    torch.manual_seed(0)
    return Fp8ProductLinear(nn.Linear(inputs, outputs, bias=bias))


def test_a_layer_against_its_unpacked_weight() -> None:
    """Three per cent: three bits of mantissa leave each number off by 2.3 % on the average of squares."""
    layer = make_layer(300, 200, bias=True)
    assert layer.bias is not None
    x, grad_RTO = drawn(2, 40, 300).requires_grad_(), drawn(2, 40, 200, seed=5)
    output = layer(x)
    gradients = torch.autograd.grad(output, (x, layer.bias), grad_RTO)
    with unpacked_products(layer):
        exact = layer(x)
        exact_gradients = torch.autograd.grad(exact, (x, layer.bias), grad_RTO)
    assert 1e-3 < relative_error(output.detach(), exact.detach()) < 0.03
    assert 1e-3 < relative_error(gradients[0], exact_gradients[0]) < 0.03
    torch.testing.assert_close(gradients[1], exact_gradients[1])


def test_the_gradient_is_the_formulas() -> None:
    """dL/dx = (dL/dy * s_W)_8 W_8 * s, in fp32."""
    layer = make_layer(48, 32)
    x, grad_TO = drawn(7, 48).requires_grad_(), drawn(7, 32, seed=5)
    layer(x).backward(grad_TO)
    rows, scale_T = quantize_rows(grad_TO * layer.scale.squeeze(1))
    expected = (rows.float() @ layer.packed.float()) * scale_T[:, None]
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)


def test_siblings_compute_what_single_layers_do() -> None:
    layers = []
    for seed in (1, 3):
        layer = LoRALinear(make_layer(64, 96), 4, 2.0)
        layer.base_layer.requires_grad_(False)
        with torch.no_grad():
            layer.lora_A.weight.copy_(0.1 * drawn(4, 64, seed=seed))
            layer.lora_B.weight.copy_(0.1 * drawn(96, 4, seed=seed + 1))
        layers.append(layer)
    together, alone = (drawn(21, 64).requires_grad_() for _ in range(2))
    sum((part * drawn(21, 96, seed=7)).sum() for part in siblings(together, layers)).backward()  # type: ignore[union-attr]
    sum((layer(alone) * drawn(21, 96, seed=7)).sum() for layer in layers).backward()
    assert together.grad is not None
    assert alone.grad is not None
    assert relative_error(together.grad, alone.grad) < 2e-3
