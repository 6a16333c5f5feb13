"""What a step's operators compute and move: FLOPs and bytes by operator, dtype and (for matrix products) shape.

FLOPs are torch's own formulas (`torch.utils.flop_counter`: a multiplication and an addition are two), and ours for the
attention kernel of the CPU and products in 8-bit integers (whose operations are counted like any). Bytes are what an
ideal kernel reads and writes: each operand and each result once. Views cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tunewise.layers import document_kernel, int8, thin

aten = torch.ops.aten

_DOCUMENT_ATTENTION = {  # where their counts stand among the arguments, and how many products a pair goes through
    document_kernel.forward_kernel_.overloadpacket: (6, 2),
    document_kernel.backward_kernel_.overloadpacket: (10, 5),
}
_INT8_IN_PLACE = (int8.matmul_kernel_.overloadpacket, int8.matmul_packed_.overloadpacket)
_INT8_PRODUCTS = (int8.matmul_kernel.overloadpacket, *_INT8_IN_PLACE, aten._int_mm)

_THIN_PRODUCTS = {  # how many products of rows (T, K), the first argument, with their thin side (T, R), the second
    thin.gradient_kernel.overloadpacket: 1,
    thin.gradient_and_product_kernel_.overloadpacket: 2,
    thin.update_kernel_.overloadpacket: 1,
}


class WorkKey(NamedTuple):
    """Operators that cost the same by the same law.

    Attributes:
        moment: part of the run ("forward", ...).
        operator: torch's name without overload ("aten.mm").
        dtype: of the first floating-point operand, else of the first one; int8 for products in 8 bits.
        shape: (m, n, k) of a matrix product (b * m for a batched one with the batch in front), else ().
    """

    moment: str
    operator: str
    dtype: torch.dtype | None
    shape: tuple[int, ...] = ()


class Work(NamedTuple):
    """How often, how many floating-point operations, how many bytes read and written."""

    calls: float
    flops: float
    moved_bytes: float


@dataclass
class WorkTable:
    """The work of a step, added up by `WorkKey`."""

    entries: dict[WorkKey, list[float]] = field(default_factory=dict)
    _is_view: dict[Any, bool] = field(default_factory=dict)

    def add(
        self,
        moment: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        results: Sequence[Tensor],
    ) -> None:
        """Count one call of an operator."""
        is_view = self._is_view.get(func)
        if is_view is None:
            is_view = self._is_view[func] = _returns_view(func)
        if is_view:
            return
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        packet = func.overloadpacket
        flops = _flops(packet, args, kwargs, output)
        first = next((o for o in operands if o.is_floating_point()), operands[0] if operands else None)
        shape = _matmul_shape(packet, args) if flops else ()
        dtype = torch.int8 if packet in _INT8_PRODUCTS else None if first is None else first.dtype
        key = WorkKey(moment, str(packet), dtype, shape)
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*operands, *results))
        entry = self.entries.setdefault(key, [0.0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += flops
        entry[2] += moved

    def totals(self) -> dict[WorkKey, Work]:
        """Return what was added up."""
        return {key: Work(*entry) for key, entry in self.entries.items()}


def _returns_view(func: Any) -> bool:
    alias = [result.alias_info for result in func._schema.returns]
    return bool(alias) and all(info is not None and not info.is_write for info in alias)


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention_flops(args[0], args[1], args[2], products=2)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return _attention_flops(args[1], args[2], args[3], products=5)
    if packet is aten._grouped_mm:
        return _grouped_flops(args[0], args[1])
    if packet in _INT8_PRODUCTS:
        rows, product = (args[1], args[0]) if packet in _INT8_IN_PLACE else (args[0], output)
        return 2 * int(product.numel()) * int(rows.shape[1])
    if packet is thin.product_kernel.overloadpacket:
        return 2 * int(args[0].shape[1]) * int(output.numel())
    if packet in _THIN_PRODUCTS:
        return 2 * int(args[0].numel()) * int(args[1].shape[1]) * _THIN_PRODUCTS[packet]
    if packet in _DOCUMENT_ATTENTION:
        first, products = _DOCUMENT_ATTENTION[packet]
        counts, lengths, heads, _, size, window = args[first : first + 6]
        return 2 * document_kernel.pairs_of(counts, lengths, int(window)) * int(heads) * int(size) * products
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=output))


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, products: int) -> int:
    """Matrix products of (L, D) and (D, L) kind, causal or not: as torch counts flash attention, whole squares.

    Forward: scores and their product with the values. Backward makes the scores again (FlashAttention-2, Dao 2023).
    """
    rows, heads, length, size = query.shape
    return 2 * rows * heads * length * key.shape[2] * max(size, value.shape[-1]) * products


def _grouped_flops(left: Tensor, right: Tensor) -> int:
    """Rows of `left` in groups, each with its own matrix; or, for a weight's gradient, both two-dimensional."""
    if left.ndim == 2 and right.ndim == 3:
        return 2 * left.shape[0] * right.shape[1] * right.shape[2]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def _matmul_shape(packet: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    if packet in (aten.mm, aten.bmm):
        left, right = args[0], args[1]
    elif packet in (aten.addmm, aten.baddbmm):
        left, right = args[1], args[2]
    else:
        return ()
    return (*left.shape[:-2], left.shape[-2], right.shape[-1], left.shape[-1])
