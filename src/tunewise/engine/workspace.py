"""What the CPU's kernels allocate and free inside, where no dispatch mode sees it (torch 2.13).

Each rule was found by comparing the profiler's allocator record with the operators' results, and is bounded: what grows
with the tensors is exact, the scratchpads of oneDNN are an approximation.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2), aten.addmm_: (1, 2)}
"""Matrix products and which of their arguments are the factors."""

_LEFT_BYTES = 64 * 1024
"""oneDNN copies its left factor in blocks of at most this, 256 numbers of a row at a time."""

_RIGHT_DEPTH = 2048
"""oneDNN packs at most so many rows of its right factor at once, 64 columns wide."""


def cpu_workspace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the bytes that torch's CPU kernel of an operator needs besides its result."""
    packet = func.overloadpacket
    if func.namespace == "bitsandbytes" and func._opname == "optimizer_update_8bit_blockwise":
        return _update_8bit_bytes(args[2])
    if packet in _PRODUCTS:
        return _product_bytes(*(args[place] for place in _PRODUCTS[packet]))
    if packet is aten.logsumexp:
        width = max(int(args[0].shape[-1]), 1)
        return _bytes(args[0]) + _bytes(args[0]) // width  # exp(x - max) and max
    if packet is aten._safe_softmax:  # of masked attention without a kernel of its own
        return int(args[0].numel()) + int(args[0].numel()) // max(int(args[0].shape[-1]), 1)  # which scores are -inf
    if torch.Tag.pointwise in func.tags:
        return _promotion_bytes(args, kwargs)
    return 0


def _product_bytes(left: Tensor, right: Tensor) -> int:
    """oneDNN's scratchpad for a product in 16 bit: blocks of both factors, and one more of a transposed left factor.

    Its choice of blocks is its own and differs between processors. This rule was read off the allocator's record of
    some shapes on one AVX-512 machine (bf16); there it is exact for some and some tens of KiB too much for others. A
    processor that oneDNN has no such product for multiplies in place.
    """
    if left.dtype.itemsize != 2 or (left.dtype == torch.bfloat16 and not _has_bf16_products()):
        return 0
    rows, depth = left.shape[-2:]
    if rows * depth * right.shape[-1] <= 16**3:  # torch multiplies small ones itself
        return 0
    packed_left = min(rows * min(depth, 256) * 2, _LEFT_BYTES)
    packed_right = min(depth, _RIGHT_DEPTH) * 64 * 2
    transposed = min(rows * depth * 2, 2 * _LEFT_BYTES) if left.stride(-1) != 1 else 0
    return packed_left + packed_right + transposed + 1024


@functools.cache
def _has_bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _update_8bit_bytes(parameter: Tensor) -> int:
    """bitsandbytes 0.50's Adam on the CPU unpacks a whole tensor: both moments, gradient, root, quotient (weight)."""
    copies = 5 if parameter.dtype == torch.float32 else 6
    return copies * 4 * parameter.numel()


def _promotion_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """An elementwise kernel of the CPU copies operands of other dtypes into the common one; CUDA's casts in flight."""
    del kwargs
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    sized = [tensor for tensor in tensors if tensor.ndim > 0]
    if len({tensor.dtype for tensor in sized}) < 2 or any(not tensor.is_floating_point() for tensor in sized):
        return 0
    common = sized[0].dtype
    for tensor in sized[1:]:
        common = torch.promote_types(common, tensor.dtype)
    return sum(tensor.numel() * common.itemsize for tensor in sized if tensor.dtype != common)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
