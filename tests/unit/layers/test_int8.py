"""Products in 8 bits: the kernels against their plain twins, the layers against the dense formula, gradients too."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tunewise.layers import native
from tunewise.layers.int8 import add_matmul_, matmul, matmul_packed_, pack, quantize_rows
from tunewise.layers.int8_linear import Int8ProductLinear
from tunewise.layers.lora import LoRALinear
from tunewise.layers.narrow_linear import unpacked_products
from tunewise.layers.siblings import gated_mlp, siblings

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler for the kernels")
SHAPES = [(1, 1, 1), (5, 3, 7), (6, 64, 64), (13, 70, 66), (130, 577, 65), (7, 4100, 3), (1030, 4099, 70)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of_8_bits(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("uses_kernel", [False, pytest.param(True, marks=needs_compiler)])
def test_rows_are_rounded_by_at_most_half_a_step(uses_kernel: bool) -> None:
    x_MK, col_scale_K = drawn(9, 33), drawn(33, seed=2).abs()
    x_MK[3] = 0.0
    rows_MK, scale_M = quantize_rows(x_MK, uses_kernel, col_scale_K)
    exact = x_MK * col_scale_K
    assert torch.equal(rows_MK.abs().amax(dim=1) == 127, exact.abs().amax(dim=1) > 0)
    assert ((rows_MK * scale_M[:, None] - exact).abs() <= 0.5001 * scale_M[:, None]).all()
    assert float(scale_M[3]) == 0.0


@pytest.mark.parametrize("uses_kernel", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_comes_out_as_not_a_number(uses_kernel: bool, bad: float) -> None:
    x_MK = drawn(3, 40)
    x_MK[1, 17] = bad
    product = matmul(quantize_rows(x_MK, uses_kernel), weight_of_8_bits(5, 40), None, torch.float32, uses_kernel)
    assert product[1].isnan().all()
    assert product[[0, 2]].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("is_unsigned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_weight_is_the_same_weight(shape: tuple[int, int, int], is_unsigned: bool, by_columns: bool) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(4)
    lowest, dtype = (0, torch.uint8) if is_unsigned else (-127, torch.int8)
    rows = (torch.randint(lowest, 128, (m, k), dtype=dtype, generator=generator), drawn(m, seed=2).abs())
    weight = weight_of_8_bits(*((k, n) if by_columns else (n, k)))
    found = torch.empty(m, n)
    matmul_packed_(found, *rows, pack(weight, by_columns, is_unsigned), None)
    assert torch.equal(found, matmul(rows, weight, None, torch.float32, True, by_columns=by_columns))


@needs_compiler
def test_panels_of_another_weight_are_refused() -> None:
    rows = (torch.ones(2, 8, dtype=torch.int8), torch.ones(2))
    with pytest.raises(ValueError, match="are not for 8 inputs and 70 outputs"):
        matmul_packed_(torch.empty(2, 70), *rows, pack(weight_of_8_bits(64, 8), False, False), None)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_against_their_twins(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    x_MK, weight_NK, col_scale_N = drawn(m, k).to(dtype), weight_of_8_bits(n, k), drawn(n, seed=3).abs()
    ours, twin = quantize_rows(x_MK, True), quantize_rows(x_MK, False)
    assert torch.equal(ours[0], twin[0])
    assert torch.equal(ours[1], twin[1])
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for by_columns in (False, True):
        weight = weight_NK.T.contiguous() if by_columns else weight_NK
        ours_MN, twin_MN = (matmul(twin, weight, col_scale_N, dtype, u, by_columns=by_columns) for u in (True, False))
        assert_close(ours_MN, twin_MN, tolerance)
    before_MN = drawn(m, n, seed=4).to(dtype)
    added = [add_matmul_(before_MN.clone(), twin, weight_NK.T.contiguous(), u) for u in (True, False)]
    assert_close(added[0], added[1], tolerance)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30)
    assert float(error) <= tolerance


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_unsigned_rows_that_do_not_follow_each_other(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(5)
    rows_MK = torch.randint(0, 256, (m, 3 * k), dtype=torch.uint8, generator=generator)[:, k : 2 * k]
    scale_M, weight_NK = drawn(m, seed=6).abs(), weight_of_8_bits(n, k)
    exact_MN = scale_M.double()[:, None] * (rows_MK.double() @ weight_NK.double().T)
    for by_columns in (False, True):
        weight = weight_NK.T.contiguous() if by_columns else weight_NK
        for uses_kernel in (True, False):
            found_MN = matmul((rows_MK, scale_M), weight, None, dtype, uses_kernel, by_columns=by_columns)
            assert_close(found_MN, exact_MN.to(dtype), 1e-6 if dtype == torch.float32 else 2**-8)


@needs_compiler
def test_a_weight_of_other_sizes_is_an_error() -> None:
    rows = quantize_rows(drawn(3, 8), True)
    with pytest.raises(ValueError, match=r"the weight is \(5, 9\), and these rows and outputs need \(5, 8\)"):
        matmul(rows, weight_of_8_bits(5, 9), None, torch.float32, True)


@needs_compiler
def test_a_processor_without_vnni_computes_the_same(tmp_path: Path) -> None:
    compiler = native.compiler()
    assert compiler is not None
    made, sources = tmp_path / "plain.so", [str(source) for source in native.SOURCES]
    flags = [*native.FLAGS, "-U__AVX512VNNI__"]
    subprocess.run([compiler, *flags, *sources, *native.LIBRARIES, "-o", str(made)], check=True)
    function = ctypes.CDLL(str(made)).int8_matmul_fp32
    function.restype = None
    x_MK, weight_NK, out_MN = drawn(13, 71), weight_of_8_bits(66, 71), torch.zeros(13, 66)
    rows_MK, scale_M = quantize_rows(x_MK, False)
    for rows in (rows_MK, rows_MK.abs().to(torch.uint8)):
        address, scale, weight, out = (ctypes.c_void_p(t.data_ptr()) for t in (rows, scale_M, weight_NK, out_MN))
        kind = (ctypes.c_int64(rows.dtype == torch.uint8), ctypes.c_int64(71))
        numbers = [ctypes.c_int64(number) for number in (13, 66, 71, 0, 0)]
        function(address, *kind, scale, weight, None, out, *numbers)
        assert_close(out_MN, matmul((rows, scale_M), weight_NK, None, torch.float32, False), 1e-6)


def make_layer(inputs: int, outputs: int, bias: bool = False, uses_kernel: bool = False) -> Int8ProductLinear:
    torch.manual_seed(0)
    layer = Int8ProductLinear(nn.Linear(inputs, outputs, bias=bias))
    layer.uses_kernel = uses_kernel
    return layer


@pytest.mark.parametrize("uses_kernel", [False, pytest.param(True, marks=needs_compiler)])
def test_a_layer_against_its_unpacked_weight(uses_kernel: bool) -> None:
    """One per cent: rounding two operands to 8 bits, 127 steps to the largest of some hundred normal numbers."""
    layer = make_layer(300, 200, bias=True, uses_kernel=uses_kernel)
    assert layer.bias is not None
    results = []
    for context in (None, layer):
        x = drawn(2, 40, 300).requires_grad_()
        if context is None:
            output = layer(x)
        else:
            with unpacked_products(layer):
                output = layer(x)
                output.backward(drawn(2, 40, 200, seed=5))
        if context is None:
            output.backward(drawn(2, 40, 200, seed=5))
        assert x.grad is not None
        results.append((output.detach(), x.grad, layer.bias.grad.clone() if layer.bias.grad is not None else None))
        layer.bias.grad = None
    (ours, ours_grad, ours_bias), (exact, exact_grad, exact_bias) = results
    assert 1e-4 < float((ours - exact).norm() / exact.norm()) < 0.012
    assert 1e-4 < float((ours_grad - exact_grad).norm() / exact_grad.norm()) < 0.012
    assert ours_bias is not None
    assert exact_bias is not None
    torch.testing.assert_close(ours_bias, exact_bias)


@needs_compiler  # of SwiGLU
@pytest.mark.parametrize("uses_kernel", [False, True])
def test_siblings_and_the_mlp_compute_what_single_layers_do(uses_kernel: bool) -> None:
    def adapted(inputs: int, outputs: int, seed: int) -> LoRALinear:
        layer = LoRALinear(make_layer(inputs, outputs, uses_kernel=uses_kernel), 4, 2.0)
        layer.base_layer.requires_grad_(False)
        with torch.no_grad():
            layer.lora_A.weight.copy_(0.1 * drawn(4, inputs, seed=seed))
            layer.lora_B.weight.copy_(0.1 * drawn(outputs, 4, seed=seed + 1))
        return layer

    gate, up, down = adapted(64, 96, 1), adapted(64, 96, 3), adapted(96, 64, 5)
    found = []
    for fast in (True, False):
        x = drawn(21, 64).requires_grad_()
        if fast:
            outputs = siblings(x, (gate, up))
            total = sum((part * drawn(21, 96, seed=7)).sum() for part in outputs)
            total = total + (gated_mlp(x, gate, up, down) * drawn(21, 64, seed=8)).sum()
        else:
            total = sum((layer(x) * drawn(21, 96, seed=7)).sum() for layer in (gate, up))
            inner = nn.functional.silu(gate(x)) * up(x)
            total = total + (down(inner) * drawn(21, 64, seed=8)).sum()
        assert isinstance(total, Tensor)
        total.backward()
        assert x.grad is not None
        factors = [p for layer in (gate, up, down) for p in (layer.lora_A.weight, layer.lora_B.weight)]
        found.append([x.grad, *(p.grad.clone() for p in factors if p.grad is not None)])
        for p in factors:
            p.grad = None
    assert len(found[0]) == len(found[1]) == 7
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain, 2e-3)  # a number that rounds to the next of 127 steps
