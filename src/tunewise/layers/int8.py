"""Products in 8-bit integers: both operands rounded to int8, one scale for each row of both, their sums exact in int32.

    x W^T  ~  s_x (x_q W_q^T) s_W        rows of x rounded when they arrive ("dynamic"), W once: W8A8

Symmetric, rounded to nearest, each row by its largest number; as LLM.int8 without outliers' columns (Dettmers et al.
2022, arXiv 2208.07339) and, with the input's gradient made in the same way, SwitchBack (Wortsman et al. 2023, arXiv
2304.13013), which keeps the weight's gradient in 16 bits: here it is LoRA's, and so does it.

Every function has a kernel (`kernels_int8.cpp`, `kernels_rounding.cpp`) and a plain twin; `uses_kernel` says which. In
the dtype of the result they differ by rounding only.

Shape suffixes: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunewise.layers import native
from tunewise.layers.fused import define
from tunewise.layers.native import call

Rows = tuple[Tensor, Tensor]
"""Rows in 8 bits: int8 (M, K), and the scale of each, fp32 (M,)."""

PANEL = 64
"""Outputs that the kernel computes at once."""

_PACKED = 2
"""The kernel's name for a weight that is stored as its panels."""


def _quantize_rows(x_MK: Tensor, col_scale_K: Tensor | None) -> Rows:
    rows_MK, scale_M = _fake_quantize_rows(x_MK, col_scale_K)
    call("quantize_rows", x_MK.dtype, x_MK, col_scale_K, rows_MK, scale_M, *x_MK.shape)
    return rows_MK, scale_M


def _fake_quantize_rows(x_MK: Tensor, col_scale_K: Tensor | None) -> Rows:
    del col_scale_K
    return torch.empty_like(x_MK, dtype=torch.int8), x_MK.new_empty(len(x_MK), dtype=torch.float32)


def _matmul_(
    out_MN: Tensor, rows_MK: Tensor, scale_M: Tensor, weight: Tensor, col_scale_N: Tensor | None, by_columns: bool,
    adds: bool,
) -> None:  # fmt: skip
    sizes = (len(rows_MK), out_MN.shape[1], rows_MK.shape[1])
    shape = (sizes[2], sizes[1]) if by_columns else (sizes[1], sizes[2])
    if weight.shape != shape:
        raise ValueError(f"the weight is {tuple(weight.shape)}, and these rows and outputs need {shape}")
    rows = (rows_MK, int(rows_MK.dtype == torch.uint8), rows_MK.stride(0), scale_M)
    call("int8_matmul", out_MN.dtype, *rows, weight, col_scale_N, out_MN, *sizes, int(by_columns), int(adds))


def _matmul(
    rows_MK: Tensor, scale_M: Tensor, weight: Tensor, col_scale_N: Tensor | None, by_columns: bool, dtype: torch.dtype
) -> Tensor:
    out_MN = _fake_matmul(rows_MK, scale_M, weight, col_scale_N, by_columns, dtype)
    _matmul_(out_MN, rows_MK, scale_M, weight, col_scale_N, by_columns, adds=False)
    return out_MN


def _fake_matmul(
    rows_MK: Tensor, scale_M: Tensor, weight: Tensor, col_scale_N: Tensor | None, by_columns: bool, dtype: torch.dtype
) -> Tensor:
    del scale_M, col_scale_N
    return rows_MK.new_empty((len(rows_MK), weight.shape[1 if by_columns else 0]), dtype=dtype)


def _pack(weight: Tensor, by_columns: bool, is_unsigned: bool) -> Tensor:
    panels = _fake_pack(weight, by_columns, is_unsigned)
    outputs, inputs = reversed(weight.shape) if by_columns else weight.shape
    pack = native.library().int8_pack
    pack.restype = None
    pack(*map(native.argument, (weight, panels)), *map(native.argument, (outputs, inputs, by_columns, is_unsigned)))
    return panels


def _fake_pack(weight: Tensor, by_columns: bool, is_unsigned: bool) -> Tensor:
    del is_unsigned
    outputs, inputs = reversed(weight.shape) if by_columns else weight.shape
    return weight.new_empty(_panels_shape(outputs, inputs), dtype=torch.uint8)


def _panels_shape(outputs: int, inputs: int) -> tuple[int, int, int]:
    return -(-outputs // PANEL), -(-inputs // 4), PANEL * 4


def _matmul_packed_(
    out_MN: Tensor, rows_MK: Tensor, scale_M: Tensor, panels: Tensor, col_scale_N: Tensor | None
) -> None:
    sizes = (len(rows_MK), out_MN.shape[1], rows_MK.shape[1])
    if panels.shape != _panels_shape(sizes[1], sizes[2]):
        raise ValueError(f"panels of {tuple(panels.shape)} are not for {sizes[2]} inputs and {sizes[1]} outputs")
    rows = (rows_MK, int(rows_MK.dtype == torch.uint8), rows_MK.stride(0), scale_M)
    call("int8_matmul", out_MN.dtype, *rows, panels, col_scale_N, out_MN, *sizes, _PACKED, 0)


_quantize_rows_kernel = define(
    "quantize_rows(Tensor x, Tensor? col_scale) -> (Tensor, Tensor)", _quantize_rows, _fake_quantize_rows
)
matmul_kernel = define(
    "int8_matmul(Tensor rows, Tensor scale, Tensor weight, Tensor? col_scale, bool by_columns, ScalarType dtype) -> "
    "Tensor",
    _matmul,
    _fake_matmul,
)
matmul_kernel_ = define(
    "int8_matmul_(Tensor(a!) out, Tensor rows, Tensor scale, Tensor weight, Tensor? col_scale, bool by_columns, "
    "bool adds) -> ()",
    _matmul_,
    lambda out, rows, scale, weight, col_scale, by_columns, adds: None,
)
pack = define("int8_pack(Tensor weight, bool by_columns, bool is_unsigned) -> Tensor", _pack, _fake_pack)
"""Put a weight, int8 (N, K) or with `by_columns` (K, N), in the order of the kernel's instructions, for signed rows or
for unsigned ones: worth its memory where few rows come at a time. uint8, as large as the weight, but for its edges."""

matmul_packed_ = define(
    "int8_matmul_packed_(Tensor(a!) out, Tensor rows, Tensor scale, Tensor panels, Tensor? col_scale) -> ()",
    _matmul_packed_,
    lambda out, rows, scale, panels, col_scale: None,
)
"""Write the product of rows with a packed weight to `out` (contiguous)."""


def quantize_rows(x_MK: Tensor, uses_kernel: bool, col_scale_K: Tensor | None = None) -> Rows:
    """Round the rows of x * col_scale to 8 bits: q = round(x / scale), scale = max|x| / 127 of each row.

    The error of a number is at most half a scale: max|x| / 254 of its row. A row of zeros has a scale of zero, one
    that holds infinity or not-a-number has not-a-number.
    """
    if uses_kernel:
        rows: Rows = _quantize_rows_kernel(x_MK.contiguous(), col_scale_K)
        return rows
    exact_MK = x_MK.float() if col_scale_K is None else x_MK.float() * col_scale_K
    most_M1 = exact_MK.abs().amax(dim=1, keepdim=True)
    scale_M = (most_M1 / 127.0 + 0.0 * exact_MK.sum(dim=1, keepdim=True)).squeeze(1)
    # `127.0 / most` would be 127 times a rounded reciprocal.
    steps_M1 = torch.where(most_M1 > 0, torch.full_like(most_M1, 127.0).div(most_M1), 0.0)
    return exact_MK.mul(steps_M1).round_().nan_to_num_().to(torch.int8), scale_M


def matmul(
    rows: Rows,
    weight: Tensor,
    col_scale_N: Tensor | None,
    dtype: torch.dtype,
    uses_kernel: bool,
    *,
    by_columns: bool = False,
) -> Tensor:
    """Multiply rows in 8 bits with a weight in 8 bits: (M, N) in `dtype`, contiguous.

    Args:
        rows: int8 or uint8 (M, K), each dense, and the scale of each.
        weight: int8, (N, K), or (K, N) with `by_columns`.
        col_scale_N: fp32, of each output; None: ones.
        dtype: fp32 or bf16 (with the plain twin any).
        uses_kernel: whether the compiled kernel computes; the weight is then contiguous.
        by_columns: how the weight is stored.
    """
    rows_MK, scale_M = rows
    if uses_kernel:
        product: Tensor = matmul_kernel(rows_MK, scale_M, weight, col_scale_N, by_columns, dtype)
        return product
    sums_MN = _sums(rows_MK, weight if by_columns else weight.T).float()
    sums_MN.mul_(scale_M[:, None])
    return (sums_MN if col_scale_N is None else sums_MN.mul_(col_scale_N)).to(dtype)


def _sums(rows_MK: Tensor, weight_KN: Tensor) -> Tensor:
    if rows_MK.dtype == torch.int8:
        return torch._int_mm(rows_MK, weight_KN)
    shifted_MK = (rows_MK.short() - 128).to(torch.int8)  # torch multiplies signed numbers only
    return torch._int_mm(shifted_MK, weight_KN).add_(weight_KN.sum(dim=0, dtype=torch.int32), alpha=128)


def matmul_into_(out_MN: Tensor, rows: Rows, weight_NK: Tensor, col_scale_N: Tensor, uses_kernel: bool) -> Tensor:
    """Write the product of rows with a weight stored by rows to `out_MN` (contiguous) and return it."""
    if uses_kernel:
        matmul_kernel_(out_MN, *rows, weight_NK, col_scale_N, False, False)
        return out_MN
    return out_MN.copy_(matmul(rows, weight_NK, col_scale_N, out_MN.dtype, False))


def add_matmul_(out_MN: Tensor, rows: Rows, weight_KN: Tensor, uses_kernel: bool) -> Tensor:
    """Add the product of rows with a weight stored by columns to `out_MN` (contiguous) and return it."""
    if uses_kernel:
        matmul_kernel_(out_MN, *rows, weight_KN, None, True, True)
        return out_MN
    return out_MN.add_(matmul(rows, weight_KN, None, torch.float32, False, by_columns=True))
