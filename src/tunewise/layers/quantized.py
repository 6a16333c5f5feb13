"""Linear layers whose frozen weight is stored in 4 or 8 bits and unpacked for every use.

    y = x dequantize(W)^T + b          Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), equation 5, first term

The autograd function keeps nothing: the backward pass unpacks the weight again. 4-bit numbers are packed and
unpacked by bitsandbytes, whose operators also know fake tensors, so a dry run uses the very same layer.

Shape suffixes: O out_features, I in_features, N blocks.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tunewise.layers import fp8
from tunewise.layers.bitsandbytes_library import import_bitsandbytes
from tunewise.layers.linear import (
    PackedLinear,
    compute_dtype,
    has_values,
    is_transposed,
    linear_shape,
    weight_of,
    without_view,
)

QuantKind = Literal["nf4", "fp4", "int8", "fp8"]

SCALE_BLOCK = 256
"""Scales that share one fp32 number in double quantization; the value of the QLoRA paper."""


class QuantizedLinear(PackedLinear):
    """A linear layer with packed weight. `bias`, when there is one, stays as it was (and may be trained)."""

    kind: QuantKind

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_shape(layer)
        self.was_transposed = is_transposed(layer)
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) in autocast's dtype, or else the input's."""
        output: Tensor = _QuantizedLinearFunction.apply(input, self.bias, self, compute_dtype(input))
        return output

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed weight with all its scales, without the bias."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return an nn.Linear (or Conv1D, where one stood here) with the unpacked weight."""
        weight_OI = self.dense_weight(dtype)
        dense: nn.Module
        with torch.device("meta"):
            if self.was_transposed:
                dense = Conv1D(self.out_features, self.in_features)
            else:
                dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        stored = weight_OI.T.contiguous() if self.was_transposed else weight_OI
        dense.weight = nn.Parameter(stored, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        """Describe the layer in print(model)."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kind={self.kind}"


class FourBitLinear(QuantizedLinear):
    """NF4 or FP4: sixteen levels times the largest magnitude of a block, in bitsandbytes' packing.

    Bits for each weight with blocks of 64: 4 + 32/64 = 4.5, and with double quantization, which stores the
    block scales in 8 bits, 4 + 8/64 + 32/(64*256) = 4.127 (QLoRA, section 3).

    Attributes:
        packed: uint8, two weights a byte, row after row.
        absmax: the blocks' scales, fp32 (N,), or their 8-bit codes, uint8 (N,).
        nested_absmax: with double quantization, fp32 scales of the scales; else None.
        offset: with double quantization, the mean that was taken off the scales, a scalar; else None.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(self, layer: nn.Module, kind: Literal["nf4", "fp4"], block_size: int, double_quant: bool) -> None:
        """Pack the weight of `layer`; of a layer without values (a dry run) only the storage is made.

        Raises:
            MissingBackend: bitsandbytes is not installed.
        """
        super().__init__(layer)
        bitsandbytes = import_bitsandbytes("4-bit quantization")
        self.kind, self.block_size = kind, block_size
        weight_OI = weight_of(layer).detach()
        num_blocks = -(-weight_OI.numel() // block_size)
        packed = weight_OI.new_empty((-(-weight_OI.numel() // 2), 1), dtype=torch.uint8)
        absmax_N = weight_OI.new_empty(num_blocks, dtype=torch.uint8 if double_quant else torch.float32)
        nested = weight_OI.new_empty(-(-num_blocks // SCALE_BLOCK), dtype=torch.float32) if double_quant else None
        offset = weight_OI.new_empty((), dtype=torch.float32) if double_quant else None
        if has_values(weight_OI):
            if weight_OI.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                weight_OI = weight_OI.float()
            packed, state = bitsandbytes.functional.quantize_4bit(
                weight_OI.contiguous(),
                blocksize=block_size,
                compress_statistics=double_quant,
                quant_type=kind,
            )
            absmax_N, offset = state.absmax, state.offset
            nested = state.state2.absmax if double_quant else None
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax_N)
        self.register_buffer("nested_absmax", nested)
        self.register_buffer("offset", offset)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Unpack the weight into a fresh tensor of shape (out, in)."""
        absmax_N = self.absmax
        if self.nested_absmax is not None and self.offset is not None:
            absmax_N = _dequantize_absmax(absmax_N, self.nested_absmax, self.offset)
        kernel_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.packed, absmax_N, self.block_size, self.kind, self._kernel_shape(), kernel_dtype
        )
        return weight.view(self.out_features, self.in_features).to(dtype)

    def _kernel_shape(self) -> tuple[int, ...]:
        """Return the shape in which to unpack: rows that hold whole blocks.

        bitsandbytes 0.50.2 unpacks wrong numbers on the CPU when a row is shorter than a block (found with
        blocks of 64 and rows of 32 and 48), so such a weight is unpacked as one row a block, or as one long
        row.
        """
        if self.in_features % self.block_size == 0:
            return self.out_features, self.in_features
        size = self.out_features * self.in_features
        return (size // self.block_size, self.block_size) if size % self.block_size == 0 else (1, size)


class RowScaledLinear(QuantizedLinear):
    """Weights rounded to numbers of one byte times one fp32 scale a row; only the weight is rounded, never the input.

    Attributes:
        packed: (out, in), in `packed_dtype`.
        scale: fp32 (out, 1).
    """

    packed_dtype: ClassVar[torch.dtype]
    packed: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Module) -> None:
        """Pack the weight of `layer`; of a layer without values (a dry run) only the storage is made."""
        super().__init__(layer)
        weight_OI = weight_of(layer).detach()
        packed_OI = weight_OI.new_empty(weight_OI.shape, dtype=self.packed_dtype)
        scale_O1 = weight_OI.new_empty((self.out_features, 1), dtype=torch.float32)
        if has_values(weight_OI):
            packed_OI, scale_O1 = self.rounded_weight(weight_OI)
        self.register_buffer("packed", packed_OI)
        self.register_buffer("scale", scale_O1)

    @staticmethod
    @abstractmethod
    def rounded_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the packed weight and its scales, (out, in) and fp32 (out, 1)."""

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Unpack the weight into a fresh tensor of shape (out, in)."""
        return self.packed.to(dtype).mul_(self.scale.to(dtype))


class Int8Linear(RowScaledLinear):
    """Weights rounded to 8-bit integers: w = q * max|row| / 127, to nearest.

    Unlike LLM.int8 the input is not rounded, and no library is needed. The error of a weight is at most max|row| / 254;
    unpacked to 16 bits, the rounding of the scale comes on top (relative 2^-9 in bf16).
    """

    kind: QuantKind = "int8"
    packed_dtype = torch.int8

    @staticmethod
    def rounded_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the packed weight and its scales, (out, in) and fp32 (out, 1)."""
        weight_OI = weight_OI.float()
        # A row of zeros keeps a scale of zero; the smallest normal number only keeps the division finite.
        scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / 127.0
        tiny = torch.finfo(torch.float32).tiny
        return (weight_OI / scale_O1.clamp_min(tiny)).round_().clamp_(-127, 127).to(torch.int8), scale_O1


class Fp8Linear(RowScaledLinear):
    """Weights rounded to E4M3: w = e4m3 * max|row| / 448.

    One of at least max|row| / 28,672 is off by at most 1/16 of itself, a smaller one by at most max|row| / 458,752.
    """

    kind: QuantKind = "fp8"
    packed_dtype = fp8.DTYPE

    @staticmethod
    def rounded_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the packed weight and its scales, (out, in) and fp32 (out, 1)."""
        packed_OI, scale_O = fp8.quantize_rows(weight_OI.contiguous())
        return packed_OI, scale_O[:, None]


def quantize_linear(
    layer: nn.Module, kind: QuantKind, block_size: int = 64, double_quant: bool = True
) -> QuantizedLinear:
    """Return a packed copy of a linear layer; `block_size` and `double_quant` concern nf4 and fp4 only.

    Raises:
        MissingBackend: nf4 or fp4 without bitsandbytes.
    """
    if kind == "int8":
        return Int8Linear(layer)
    if kind == "fp8":
        return Fp8Linear(layer)
    return FourBitLinear(layer, kind, block_size, double_quant)


@torch.library.custom_op("tunewise::dequantize_absmax", mutates_args=())
def _dequantize_absmax(codes_N: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Unpack the block scales of double quantization into fp32.

    An operator of its own because bitsandbytes' function brings a real table of codes, which may not meet
    fake tensors.
    """
    from bitsandbytes.functional import dequantize_blockwise

    codes = _scale_codes(codes_N.device)
    absmax_N: Tensor = dequantize_blockwise(codes_N, absmax=nested_absmax, code=codes, blocksize=SCALE_BLOCK)
    return absmax_N.add_(offset)


@functools.cache
def _scale_codes(device: torch.device) -> Tensor:
    """Return the 256 numbers that 8-bit scales stand for, once on each device."""
    from bitsandbytes.functional import create_dynamic_map

    codes: Tensor = create_dynamic_map().to(device)
    return codes


@_dequantize_absmax.register_fake
def _(codes_N: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    del nested_absmax, offset
    return torch.empty_like(codes_N, dtype=torch.float32)


class _QuantizedLinearFunction(torch.autograd.Function):
    """Unpack, multiply, forget; the backward pass unpacks again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.input_dtype = layer, input.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        cast_bias = None if bias is None else bias.to(dtype)
        return without_view(functional.linear(input.to(dtype), layer.dense_weight(dtype), cast_bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad @ ctx.layer.dense_weight(grad.dtype)).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_input, grad_bias, None, None
