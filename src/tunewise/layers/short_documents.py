"""Attention inside short documents in bf16: one kernel a pass (`kernels_attention.cpp`) for all of them.

A batched product computes whole squares of scores and keeps them in memory between product and softmax; the kernel
takes a document and a head at a time, computes the half that causality leaves, and nothing leaves a core's own cache.
For processors with AVX-512 BF16; everything else goes through the products of `products.py`, which is its twin.

P slots of all buckets, H heads of queries, K heads of keys, D size of a head; tensors are flat, (document, head,
position, D), as `products.gather` makes them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunewise.layers import native
from tunewise.layers.attention import Plan
from tunewise.layers.fused import define
from tunewise.layers.native import call

LONGEST = 2048
"""Positions of the longest document that the kernel takes: what it works on lies in a core's own cache. At this length
it is as fast as the products (LOG), without their scores in memory."""

VECTOR = 16
"""Numbers that a product takes at once: the size of a head must be a multiple."""

_SHAPE = "int[] counts, int[] lengths, int heads, int keys, int size, int window, float scale"


def _forward(
    out: Tensor, log_sum: Tensor, query: Tensor, key: Tensor, value: Tensor, counts: Sequence[int],
    lengths: Sequence[int], heads: int, keys: int, size: int, window: int, scale: float,
) -> None:  # fmt: skip
    buckets = (torch.tensor(counts), torch.tensor(lengths), len(counts))
    call("document_attention", query.dtype, query, key, value, out, log_sum, *buckets, heads, keys, size, window, scale)


def _backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, grad: Tensor, log_sum: Tensor, query: Tensor, key: Tensor,
    value: Tensor, counts: Sequence[int], lengths: Sequence[int], heads: int, keys: int, size: int, window: int,
    scale: float,
) -> None:  # fmt: skip
    buckets = (torch.tensor(counts), torch.tensor(lengths), len(counts))
    call(
        "document_attention_backward", query.dtype, query, key, value, grad, log_sum, grad_query, grad_key, grad_value,
        *buckets, heads, keys, size, window, scale,
    )  # fmt: skip


forward_kernel_ = define(
    f"document_attention_(Tensor(a!) out, Tensor(b!) log_sum, Tensor query, Tensor key, Tensor value, {_SHAPE}) -> ()",
    _forward,
    lambda *arguments: None,
)
backward_kernel_ = define(
    "document_attention_backward_(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor grad, "
    f"Tensor log_sum, Tensor query, Tensor key, Tensor value, {_SHAPE}) -> ()",
    _backward,
    lambda *arguments: None,
)


@functools.cache
def has_kernel() -> bool:
    """Whether this processor has the kernel's instructions (and a compiler made it)."""
    return native.why_not() is None and bool(native.library().has_document_attention())


@dataclass(frozen=True)
class ShortDocuments:
    """The documents of a plan that the kernel takes: its last buckets, for a plan's longest come first.

    Attributes:
        counts, lengths: of the buckets.
        first_slot: where they begin.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    first_slot: int

    @staticmethod
    def of(plan: Plan, size: int, dtype: torch.dtype) -> ShortDocuments | None:
        """Return them, or None where there are none or the kernel does not compute them."""
        if dtype != torch.bfloat16 or size % VECTOR or not has_kernel():
            return None
        short = [(count, length) for count, length in plan.buckets if length <= LONGEST]
        if not short:
            return None
        slots = len(plan.token) - sum(count * length for count, length in short)
        return ShortDocuments(tuple(count for count, _ in short), tuple(length for _, length in short), slots)

    def forward_(
        self, out: Tensor, log_sum: Tensor, parts: Sequence[Tensor], heads: tuple[int, int, int], window: int,
        scale: float,
    ) -> None:  # fmt: skip
        """Write the output and the logarithms of the softmax's sums: the parts of `out` and `log_sum` that are these.

        Args:
            out: (P * H * D).
            log_sum: fp32 (P * H); these documents' lie (document, head, position) behind those of all others.
            parts: query, key and value, flat.
            heads: H, K, D.
            window: positions back that a query sees, itself included; 0 means all.
            scale: factor on the scores.
        """
        counts = (heads[0], heads[1], heads[1])
        rest = [self._rest(part, count * heads[2]) for part, count in zip(parts, counts, strict=True)]
        own = self._rest(out, heads[0] * heads[2])
        forward_kernel_(own, self._rest(log_sum, heads[0]), *rest, self.counts, self.lengths, *heads, window, scale)

    def backward_(
        self, grads: Sequence[Tensor], grad: Tensor, log_sum: Tensor, parts: Sequence[Tensor],
        heads: tuple[int, int, int], window: int, scale: float,
    ) -> None:  # fmt: skip
        """Write the gradients of query, key and value; `grad` is that of the output, flat as it is."""
        counts = (heads[0], heads[1], heads[1])
        own = [self._rest(part, count * heads[2]) for part, count in zip(grads, counts, strict=True)]
        rest = [self._rest(part, count * heads[2]) for part, count in zip(parts, counts, strict=True)]
        came = self._rest(grad, heads[0] * heads[2])
        log_sum = self._rest(log_sum, heads[0])
        backward_kernel_(*own, came, log_sum, *rest, self.counts, self.lengths, *heads, window, scale)

    def _rest(self, flat: Tensor, width: int) -> Tensor:
        return flat[self.first_slot * width :]


def pairs_of(counts: Sequence[int], lengths: Sequence[int]) -> int:
    """Return the pairs of a query and a key that it sees in so many documents of these lengths."""
    return sum(count * length * (length + 1) // 2 for count, length in zip(counts, lengths, strict=True))
