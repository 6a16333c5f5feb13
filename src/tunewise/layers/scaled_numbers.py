"""Tensors in 8 or 16 bits with one scale for the whole tensor: how FP8-LM stores what a step needs.

    stored = round(values * scale),  scale = 2^k so that the largest value lies in the upper half of the format's range

A power of two changes no mantissa, so a tensor that is stored, read and stored again stays what it was.

References:
    Peng et al. 2023, "FP8-LM: Training FP8 Large Language Models" (arXiv 2310.18313), section 2; formats: Micikevicius
    et al. 2022, "FP8 Formats for Deep Learning" (arXiv 2209.05433): E4M3 to 448, E5M2 to 57344.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

NumberFormat = Literal["fp32", "bf16", "fp16", "fp8", "fp8_e5m2"]
"""fp8 is E4M3. fp16 and the FP8 formats come with a scale; bf16 and fp32 have range enough."""

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}

_LARGEST_POWERS = {torch.float16: 15, torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
"""The largest power of two of each format that needs a scale."""

_LARGEST_SCALE_POWER = 126
"""So that the scale itself is a normal fp32 number, however small the values are."""


def is_scaled(number_format: NumberFormat) -> bool:
    """Whether tensors in this format come with a scale."""
    return DTYPES[number_format] in _LARGEST_POWERS


def scale_for(values: Tensor, number_format: NumberFormat) -> Tensor:
    """Return the scale, an fp32 scalar, that brings the largest magnitude into the top octave below 2^largest."""
    _, exponent = torch.frexp(values.abs().amax().float())
    power = (_LARGEST_POWERS[DTYPES[number_format]] - exponent).clamp_(max=_LARGEST_SCALE_POWER)
    return torch.ldexp(torch.ones_like(power, dtype=torch.float32), power)


def encode(values: Tensor, number_format: NumberFormat, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return (stored, scale) of `values`; numbers beyond the format's range become its largest.

    Args:
        values: fp32.
        number_format: how to store them; of an unscaled one the scale is None.
        scale: the scale to use; None: the best one for these values.
    """
    dtype = DTYPES[number_format]
    if not is_scaled(number_format):
        return values.to(dtype), None
    scale = scale_for(values, number_format) if scale is None else scale
    largest = torch.finfo(dtype).max
    return (values * scale).clamp_(-largest, largest).to(dtype), scale


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Return a fresh fp32 tensor of the values."""
    values = stored.to(torch.float32, copy=True)
    return values if scale is None else values.div_(scale)
