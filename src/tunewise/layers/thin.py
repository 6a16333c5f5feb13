"""Products with LoRA's factors in bf16, which are thin: R columns, a few dozen at most.

General products order their operands first and prepare themselves for every new number of tokens, which for such
products takes longer than they do; the kernels (`kernels_thin.cpp`) read the tokens as they lie. Sums are made in fp32.
For processors with AVX-512 BF16; everything else goes through torch's products, which are the twins.

Shape suffixes: T tokens, K features, R columns. Rows may lie apart, but each is dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunewise.layers.document_kernel import block
from tunewise.layers.fused import define
from tunewise.layers.native import call

VECTOR = 16
"""The number of features must be a multiple."""

MOST = 64
"""Columns that the kernels take."""


def _product(x_TK: Tensor, factor_RK: Tensor) -> Tensor:
    low_TR = _fake_product(x_TK, factor_RK)
    call("thin_product", x_TK.dtype, x_TK, x_TK.stride(0), factor_RK, low_TR, *x_TK.shape, len(factor_RK))
    return low_TR


def _fake_product(x_TK: Tensor, factor_RK: Tensor) -> Tensor:
    return x_TK.new_empty(len(x_TK), len(factor_RK))


def _gradient(x_TK: Tensor, low_TR: Tensor) -> Tensor:
    grad_RK = _fake_gradient(x_TK, low_TR)
    _gradient_into(grad_RK, x_TK, low_TR, None, None, 1.0)
    return grad_RK


def _fake_gradient(x_TK: Tensor, low_TR: Tensor) -> Tensor:
    return x_TK.new_empty(low_TR.shape[1], x_TK.shape[1], dtype=torch.float32)


def _gradient_into(
    grad_RK: Tensor, x_TK: Tensor, low_TR: Tensor, factor_KR: Tensor | None, product_TR: Tensor | None, scale: float
) -> None:
    ends = (x_TK.stride(0), low_TR, low_TR.stride(0), grad_RK, factor_KR, product_TR)
    stride = 0 if product_TR is None else product_TR.stride(0)
    call("thin_gradient", x_TK.dtype, x_TK, *ends, stride, *x_TK.shape, len(grad_RK), scale)


def _gradient_and_product_(x_TK: Tensor, low_TR: Tensor, factor_KR: Tensor, product_TR: Tensor, scale: float) -> Tensor:
    grad_RK = _fake_gradient(x_TK, low_TR)
    _gradient_into(grad_RK, x_TK, low_TR, factor_KR, product_TR, scale)
    return grad_RK


def _update_(out_TK: Tensor, low_TR: Tensor, factor: Tensor, by_columns: bool, scale: float) -> None:
    sizes = (*out_TK.shape, low_TR.shape[1])
    rows = (out_TK, out_TK.stride(0), low_TR, low_TR.stride(0), factor)
    call("thin_update", out_TK.dtype, *rows, *sizes, int(by_columns), scale)


product_kernel = define("thin_product(Tensor x, Tensor factor) -> Tensor", _product, _fake_product)
gradient_kernel = define("thin_gradient(Tensor x, Tensor low) -> Tensor", _gradient, _fake_gradient)
gradient_and_product_kernel_ = define(
    "thin_gradient_and_product_(Tensor x, Tensor low, Tensor factor, Tensor(a!) product, float scale) -> Tensor",
    _gradient_and_product_,
    lambda x, low, factor, product, scale: _fake_gradient(x, low),
)
update_kernel_ = define(
    "thin_update_(Tensor(a!) out, Tensor low, Tensor factor, bool by_columns, float scale) -> ()",
    _update_,
    lambda out, low, factor, by_columns, scale: None,
)


def can_multiply(x_TK: Tensor, columns: int) -> bool:
    """Whether the kernels multiply these rows with so many columns."""
    is_ours = x_TK.device.type == "cpu" and x_TK.dtype == torch.bfloat16 and x_TK.stride(1) == 1
    is_even = x_TK.shape[1] % VECTOR == 0 and x_TK.stride(0) % 2 == 0
    return is_ours and is_even and columns <= MOST and block() > 0


def product(x_TK: Tensor, factor_RK: Tensor) -> Tensor:
    """Return x factor^T, (T, R)."""
    if not can_multiply(x_TK, len(factor_RK)):
        return x_TK @ factor_RK.T
    found: Tensor = product_kernel(x_TK, factor_RK.contiguous())
    return found


def gradient(x_TK: Tensor, low_TR: Tensor) -> Tensor:
    """Return low^T x, (R, K), in fp32 from the kernel, else in their dtype."""
    if not can_multiply(x_TK, low_TR.shape[1]):
        return low_TR.T @ x_TK
    found: Tensor = gradient_kernel(x_TK, low_TR)
    return found


def gradient_and_product_(x_TK: Tensor, low_TR: Tensor, factor_KR: Tensor, product_TR: Tensor, scale: float) -> Tensor:
    """Return scale low^T x, (R, K), and write scale x factor to `product_TR`: x is read once."""
    if not can_multiply(x_TK, low_TR.shape[1]):
        product_TR.copy_((x_TK @ factor_KR).mul_(scale))
        return (low_TR.T @ x_TK).mul_(scale)
    found: Tensor = gradient_and_product_kernel_(x_TK, low_TR, factor_KR.contiguous(), product_TR, scale)
    return found


def update_(out_TK: Tensor, low_TR: Tensor, factor: Tensor, *, by_columns: bool, scale: float = 1.0) -> None:
    """Add scale low factor to `out_TK`; the factor is (R, K) with `by_columns`, else (K, R)."""
    if can_multiply(out_TK, low_TR.shape[1]):
        update_kernel_(out_TK, low_TR, factor.contiguous(), by_columns, scale)
    else:
        out_TK.addmm_(low_TR, factor if by_columns else factor.T, alpha=scale)
