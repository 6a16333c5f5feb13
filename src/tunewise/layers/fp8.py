"""Products in FP8: both operands rounded to E4M3, one scale for each row of both, sums in fp32.

    x W^T  ~  s_x (x_8 W_8^T) s_W        rows of x rounded when they arrive, W once

E4M3 has three bits of mantissa and reaches from 2^-9 to 448 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning",
arXiv 2209.05433); the largest number of a row becomes 448, so that one outlying row costs the others nothing. Gradients
are E4M3 as well: with a scale for each row the range of E5M2 is not needed, and its lost bit of mantissa would be
(as DeepSeek-V3, arXiv 2412.19437, section 3.3.2, with tiles for rows).

The product is torch's own operation (`torch._scaled_mm`): on NVIDIA's Ada, Hopper and later tensor cores, twice bf16's
rate; on CPUs plain arithmetic, no faster than fp32. On CUDA it takes only sizes that are multiples of 16 and returns
bf16.

Shape suffixes: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tunewise.layers.linear import has_values

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
MULTIPLE = 16
"""Of sizes, on CUDA."""

Rows = tuple[Tensor, Tensor]
"""Rows in E4M3 (M, K), and the scale of each, fp32 (M,)."""


def quantize_rows(x_MK: Tensor, col_scale_K: Tensor | None = None) -> Rows:
    """Round the rows of x * col_scale to E4M3: x_8 = round(x / scale), scale = max|x| / 448 of each row.

    A number of at least 2^-6 scales is rounded by at most 1/16 of itself. A row of zeros has a scale of zero; one that
    holds infinity or not-a-number becomes not-a-number.
    """
    if x_MK.device.type == "cuda" and has_values(x_MK):
        return _compiled()(x_MK, col_scale_K)
    return _quantize_rows(x_MK, col_scale_K)


def _quantize_rows(x_MK: Tensor, col_scale_K: Tensor | None) -> Rows:
    exact_MK = x_MK.float() if col_scale_K is None else x_MK.float() * col_scale_K
    scale_M1 = exact_MK.abs().amax(dim=1, keepdim=True) / LARGEST
    # The smallest normal number only keeps the division finite; clamping, because E4M3 has no infinity to round to.
    steps_MK = exact_MK / scale_M1.clamp_min(torch.finfo(torch.float32).tiny)
    return steps_MK.clamp_(-LARGEST, LARGEST).to(DTYPE), scale_M1.squeeze(1)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor | None], Rows]:
    """One kernel instead of five passes over memory; not measured yet."""
    return torch.compile(_quantize_rows, dynamic=True, fullgraph=True)


def matmul(
    rows: Rows, weight: Tensor, col_scale_N: Tensor | None, dtype: torch.dtype, *, by_columns: bool = False
) -> Tensor:
    """Multiply rows in E4M3 with a weight in E4M3: (M, N) in `dtype`.

    Args:
        rows: E4M3 (M, K) and the scale of each row.
        weight: E4M3, (N, K), or (K, N) with `by_columns`; contiguous.
        col_scale_N: fp32, of each output; None: ones.
        dtype: of the result; on CUDA bf16.
        by_columns: how the weight is stored. The tensor cores read it by rows of outputs, so it is copied then: K N
            bytes, some hundredths of the time of the product with a thousand rows.
    """
    rows_MK, scale_M = rows
    weight_NK = weight.t().contiguous() if by_columns else weight
    scale_N = scale_M.new_ones(len(weight_NK)) if col_scale_N is None else col_scale_N
    return torch._scaled_mm(rows_MK, weight_NK.t(), scale_M[:, None], scale_N[None, :], out_dtype=dtype)


def plain_matmul(
    rows: Rows, weight: Tensor, col_scale_N: Tensor | None, dtype: torch.dtype, *, by_columns: bool = False
) -> Tensor:
    """The twin of `matmul`: the unpacked rows and weight, multiplied in fp32."""
    rows_MK, scale_M = rows
    weight_NK = (weight.t() if by_columns else weight).float()
    if col_scale_N is not None:
        weight_NK = weight_NK * col_scale_N[:, None]
    return ((rows_MK.float() * scale_M[:, None]) @ weight_NK.T).to(dtype)
