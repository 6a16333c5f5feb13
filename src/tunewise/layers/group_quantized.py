"""Linear layers whose weight is stored in 4, 3 or 2 bits with a scale and an offset for each group of inputs.

    w = scale * q + offset,   q in 0 ... 2^bits - 1, offset the group's smallest weight, scale its range / (2^bits - 1)

Asymmetric uniform quantization, rounded to nearest, as QA-LoRA needs it (Xu et al. 2023, arXiv 2309.14717, equation 2,
with the zero point kept as a real number): an update that is constant inside a group changes nothing but the offset.
The paper takes its base from GPTQ, which needs calibration data; here the weight alone decides.

Bits for each weight with groups of L: bits + (16 + 32) / L, for 4 bits and groups of 32: 5.5.

Shape suffixes: O out_features, I in_features, G groups of a row, L inputs of a group.
"""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunewise.layers.linear import has_values, weight_of
from tunewise.layers.quantized import QuantizedLinear

GroupKind = Literal["int4", "int3", "int2"]
GROUP_KINDS: tuple[GroupKind, ...] = get_args(GroupKind)

_PLANES = {"int4": (4,), "int3": (2, 1), "int2": (2,)}
"""The bits of a number, from the lowest, in parts that fill bytes: 3 bits are two and one."""


class GroupQuantizedLinear(QuantizedLinear):
    """A linear layer with packed weight, group by group along the inputs.

    Attributes:
        group_size: inputs that share a scale and an offset; a multiple of 8. The last group of a row may be shorter.
        packed: uint8 (O, G * L * bits / 8). A row of codes q_0 ... q_(GL-1), zeros behind the weight's end, is split
        into
            planes of bits (4; or 2 and 1; or 2), the lowest first; each plane fills its bytes from the lowest bit.
        scale: bf16 (O, G).
        offset: fp32 (O, G).
    """

    kind: GroupKind  # type: ignore[assignment]
    packed: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, layer: nn.Module, kind: GroupKind, group_size: int) -> None:
        """Pack the weight of `layer`; of a layer without values (a dry run) only the storage is made."""
        super().__init__(layer)
        self.kind, self.group_size = kind, group_size
        weight_OI = weight_of(layer).detach()
        rows, width = self.out_features, self.num_groups * group_size
        packed = weight_OI.new_empty((rows, width * sum(_PLANES[kind]) // 8), dtype=torch.uint8)
        scale_OG = weight_OI.new_empty((rows, self.num_groups), dtype=torch.bfloat16)
        offset_OG = weight_OI.new_empty((rows, self.num_groups), dtype=torch.float32)
        if has_values(weight_OI):
            codes, scale_OG, offset_OG = quantize_groups(weight_OI.float(), sum(_PLANES[kind]), group_size)
            packed = pack_codes(codes, kind)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale_OG)
        self.register_buffer("offset", offset_OG)

    @property
    def num_groups(self) -> int:
        """Groups of a row of the weight."""
        return -(-self.in_features // self.group_size)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Unpack the weight into a fresh tensor of shape (out, in); computed in fp32 or better, then rounded."""
        exact = torch.promote_types(dtype, torch.float32)
        codes_OGL = unpack_codes(self.packed, self.kind).to(exact).view(self.out_features, self.num_groups, -1)
        weight_OGL = codes_OGL.mul_(self.scale[..., None].to(exact)).add_(self.offset[..., None].to(exact))
        weight_OI = weight_OGL.view(self.out_features, -1)[:, : self.in_features]
        return weight_OI.to(dtype).contiguous()

    @torch.no_grad()
    def shifted(self, update_OG: Tensor) -> GroupQuantizedLinear:
        """Return a copy whose weight is larger by `update_OG`, the same number for all inputs of a group."""
        layer = copy.deepcopy(self)
        layer.offset.add_(update_OG.to(layer.offset))
        return layer


def quantize_groups(weight_OI: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes uint8 (O, G * L), scale bf16 (O, G), offset fp32 (O, G)) of an fp32 weight.

    The scale is rounded to bf16 upwards before the codes are made, so the largest weight of a group keeps its code. The
    error of a weight is at most half a scale.
    """
    rows, in_features = weight_OI.shape
    missing = -in_features % group_size
    padded_OI = functional.pad(weight_OI[:, None], (0, missing), mode="replicate")[:, 0]  # no new extremes
    weight_OGL = padded_OI.view(rows, -1, group_size)
    offset_OG = weight_OGL.amin(dim=2)
    exact_OG = (weight_OGL.amax(dim=2) - offset_OG) / (2**bits - 1)
    scale_OG = exact_OG.to(torch.bfloat16)
    next_up = (scale_OG.view(torch.int16) + 1).view(torch.bfloat16)  # of positive numbers
    scale_OG = torch.where(scale_OG.float() < exact_OG, next_up, scale_OG)
    # A group of equal weights has a scale of zero; the smallest normal number only keeps the division finite.
    divisor = scale_OG.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    codes = ((weight_OGL - offset_OG[..., None]) / divisor).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    codes = codes.view(rows, -1)
    codes[:, in_features:] = 0
    return codes, scale_OG, offset_OG


def pack_codes(codes: Tensor, kind: GroupKind) -> Tensor:
    """Pack codes, uint8 (O, N) with N a multiple of 8, into bytes, uint8 (O, N * bits / 8)."""
    parts, lowest = [], 0
    for width in _PLANES[kind]:
        plane = (codes >> lowest) & (2**width - 1)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        parts.append((plane.view(len(codes), -1, 8 // width) << shifts).sum(dim=2, dtype=torch.uint8))
        lowest += width
    return torch.cat(parts, dim=1)


def unpack_codes(packed: Tensor, kind: GroupKind) -> Tensor:
    """Undo `pack_codes`."""
    planes = _PLANES[kind]
    num_codes = packed.shape[1] * 8 // sum(planes)
    codes = packed.new_zeros((len(packed), num_codes))
    start, lowest = 0, 0
    for width in planes:
        end = start + num_codes * width // 8
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane = ((packed[:, start:end, None] >> shifts) & (2**width - 1)).view(len(packed), -1)
        codes |= plane << lowest
        start, lowest = end, lowest + width
    return codes
