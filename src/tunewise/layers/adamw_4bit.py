"""AdamW with 4-bit moments: one byte a parameter for both instead of eight.

    first moment    blocks of 128 numbers with one fp32 scale, levels of the signed dynamic map (dense near zero)
    second moment   rank-1 scales: a number at (i, j) is divided by min(max of row i, max of column j); levels k / 16
                    without zero, because a second moment of zero would make an update infinite

Tensors of fewer than 4096 numbers keep fp32 moments, and second moments of vectors have blocks of 128 as well.

References:
    Li, Chen, Zhu 2023, "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507: section 4.1 (no zero
    point), 4.2 (rank-1 normalization), 3 (blocks of 128); the dynamic map: Dettmers 2015, arXiv 1511.04561.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunewise.layers.optimizers import TensorwiseAdam, keep

BLOCK = 128
SMALLEST = 4096
"""Tensors with fewer numbers are not worth quantizing; bitsandbytes' and the paper's threshold."""

_POSITIVE = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)
SIGNED_LEVELS = (*(-level for level in reversed(_POSITIVE)), 0.0, *_POSITIVE, 1.0)
"""The signed dynamic map of 4 bits: a sign, leading zeros as a decimal exponent, the rest a linear fraction."""

Scales = tuple[Tensor, ...]


class AdamW4bit(TensorwiseAdam):
    """AdamW with the states described in the module's docstring; `state` holds uint8 codes, two a byte."""

    def update_tensor(
        self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Unpack, update and pack one parameter's moments."""
        gradient, (beta1, beta2) = gradient.float(), group["betas"]
        is_packed = parameter.numel() >= SMALLEST
        state["step"] = state.get("step", 0) + 1
        if state["step"] == 1:
            first, second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        elif is_packed:
            first = unpack_first(state["exp_avg"], state["exp_avg_scale"], gradient.shape)
            second = unpack_second(state["exp_avg_sq"], _second_scales(state), gradient.shape)
        else:
            first, second = state["exp_avg"], state["exp_avg_sq"]
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = (first / root).mul_(-group["lr"] / (1 - beta1 ** state["step"]))
        parameter.add_(update.to(parameter.dtype))
        if is_packed:
            codes, scale = pack_first(first)
            keep(state, "exp_avg", codes)
            keep(state, "exp_avg_scale", scale)
            codes, scales = pack_second(second)
            keep(state, "exp_avg_sq", codes)
            for number, scale in enumerate(scales):
                keep(state, f"exp_avg_sq_scale{number}", scale)
        elif state["step"] == 1:
            state["exp_avg"], state["exp_avg_sq"] = first, second


def pack_first(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, block scales) of a first moment in fp32."""
    blocks, scale = _block_scaled(values)
    levels = torch.tensor(SIGNED_LEVELS, device=values.device)
    codes = torch.bucketize(blocks, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return _pack_nibbles(codes.to(torch.uint8)), scale


def unpack_first(codes: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    """Return the fp32 first moment that `pack_first` packed."""
    levels = torch.tensor(SIGNED_LEVELS, device=codes.device)
    blocks = levels[_unpack_nibbles(codes).int()].view(-1, BLOCK).mul_(scale[:, None])
    return blocks.view(-1)[: shape.numel()].view(shape)


def pack_second(values: Tensor) -> tuple[Tensor, Scales]:
    """Return (codes, scales) of a second moment in fp32: maxima of rows and columns, or of blocks where it is no
    matrix."""
    if values.ndim == 2:
        scales: Scales = (values.amax(dim=1), values.amax(dim=0))
        relative = values / _rank_1(scales).clamp_min_(torch.finfo(torch.float32).tiny)
        relative = functional.pad(relative.view(-1), (0, -values.numel() % 2))
    else:
        blocks, scale = _block_scaled(values)
        relative, scales = blocks.view(-1), (scale,)
    codes = relative.mul_(16.0).round_().sub_(1.0).clamp_(0.0, 15.0)
    return _pack_nibbles(codes.to(torch.uint8)), scales


def unpack_second(codes: Tensor, scales: Scales, shape: torch.Size) -> Tensor:
    """Return the fp32 second moment that `pack_second` packed."""
    relative = _unpack_nibbles(codes).float().add_(1.0).div_(16.0)
    if len(scales) == 2:
        return relative[: shape.numel()].view(shape).mul_(_rank_1(scales))
    return relative.view(-1, BLOCK).mul_(scales[0][:, None]).view(-1)[: shape.numel()].view(shape)


def _rank_1(scales: Scales) -> Tensor:
    return torch.minimum(scales[0][:, None], scales[1][None, :])


def _block_scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values relative to their block's largest magnitude, in whole blocks, and those magnitudes."""
    flat = functional.pad(values.reshape(-1), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(dim=1)
    return flat / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None], scale


def _pack_nibbles(codes: Tensor) -> Tensor:
    pairs = codes.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=1).view(-1)


def _second_scales(state: dict[str, Any]) -> Scales:
    return tuple(state[key] for key in ("exp_avg_sq_scale0", "exp_avg_sq_scale1") if key in state)
