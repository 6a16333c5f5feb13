"""Attention inside documents in bf16: one kernel a pass (`kernels_attention.cpp`) for all documents of a micro-batch.

Batched products compute squares of scores and keep them in memory between product and softmax; the kernel keeps them in
a core's own cache and computes only the half that causality leaves. For processors with AVX-512 BF16; everything else
goes through the products of `products.py`, which is its twin.

P slots of all buckets, H heads of queries, K heads of keys, D size of a head; tensors are flat, (document, head,
position, D), as `products.gather` makes them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tunewise.layers import native
from tunewise.layers.attention import Plan
from tunewise.layers.fused import define
from tunewise.layers.native import call

VECTOR = 16
"""Numbers that a product takes at once: the size of a head must be a multiple."""

_SHAPE = "int[] counts, int[] lengths, int heads, int keys, int size, int window, float scale"


def _forward(
    out: Tensor, log_sum: Tensor, room: Tensor, query: Tensor, key: Tensor, value: Tensor, counts: Sequence[int],
    lengths: Sequence[int], heads: int, keys: int, size: int, window: int, scale: float,
) -> None:  # fmt: skip
    rest = (torch.tensor(counts), torch.tensor(lengths), len(counts), heads, keys, size, window, scale)
    call("document_attention", query.dtype, query, key, value, out, log_sum, room, *rest)


def _backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, room: Tensor, grad: Tensor, log_sum: Tensor,
    delta: Tensor, query: Tensor, key: Tensor, value: Tensor, counts: Sequence[int], lengths: Sequence[int], heads: int,
    keys: int, size: int, window: int, scale: float,
) -> None:  # fmt: skip
    rest = (torch.tensor(counts), torch.tensor(lengths), len(counts), heads, keys, size, window, scale)
    call(
        "document_attention_backward", query.dtype, query, key, value, grad, log_sum, delta, grad_query, grad_key,
        grad_value, room, *rest,
    )  # fmt: skip


def _dots(
    one_TX: Tensor, other_TX: Tensor, slot_T: Tensor, start_P: Tensor, length_P: Tensor, heads: int, size: int
) -> Tensor:
    dots = one_TX.new_zeros(len(start_P) * heads, dtype=torch.float32)
    strides = (one_TX.stride(0), other_TX.stride(0))
    places = (slot_T, start_P, length_P, len(start_P), len(slot_T), heads, size)
    call("dots", one_TX.dtype, one_TX, other_TX, *strides, dots, *places)
    return dots


forward_kernel_ = define(
    "document_attention_(Tensor(a!) out, Tensor(b!) log_sum, Tensor(c!) room, Tensor query, Tensor key, Tensor value, "
    f"{_SHAPE}) -> ()",
    _forward,
    lambda *arguments: None,
)
backward_kernel_ = define(
    "document_attention_backward_(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!) room, "
    f"Tensor grad, Tensor log_sum, Tensor delta, Tensor query, Tensor key, Tensor value, {_SHAPE}) -> ()",
    _backward,
    lambda *arguments: None,
)
dots = define(
    "dots(Tensor one, Tensor other, Tensor slot, Tensor start, Tensor length, int heads, int size) -> Tensor",
    _dots,
    lambda one, other, slot, start, length, heads, size: one.new_empty(len(start) * heads, dtype=torch.float32),
)
"""For each slot and head the scalar product of two rows of tokens, fp32 (P * H), (document, head, position)."""


@functools.cache
def block() -> int:
    """Return up to how many positions a document is one thread's, in its own memory; longer ones need `room`.

    0: this processor has not the kernel's instructions, or no compiler made it.
    """
    return int(native.library().document_attention_block()) if native.why_not() is None else 0


def can_attend(size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel computes heads of this size in this dtype here."""
    return dtype == torch.bfloat16 and size % VECTOR == 0 and block() > 0


def forward(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, heads: tuple[int, int, int], window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, flat like the queries, and the logarithms of the softmax's sums, fp32 (P * H).

    Args:
        query, key, value: (P * heads * D), flat.
        plan: where the documents lie.
        heads: H, K, D.
        window: positions back that a query sees, itself included; 0 means all.
        scale: factor on the scores.
    """
    output, log_sum = torch.empty_like(query), query.new_empty(len(plan.start) * heads[0], dtype=torch.float32)
    length, size = _longest(plan), heads[2]
    panels = 2 * -(-length // VECTOR) * VECTOR * size  # keys and values in the order of the instructions
    forward_kernel_(output, log_sum, query.new_empty(panels), query, key, value, *_split(plan), *heads, window, scale)
    return output, log_sum


def backward(
    grad: Tensor, log_sum: Tensor, delta: Tensor, parts: Sequence[Tensor], plan: Plan, heads: tuple[int, int, int],
    window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value (`parts`).

    Args:
        grad: the output's gradient, flat as it is.
        log_sum: of `forward`.
        delta: fp32 (P * H), the output's scalar products with its gradient (`dots`).
        parts: query, key and value.
        plan, heads, window, scale: as in `forward`.
    """
    grads = (torch.empty_like(parts[0]), torch.empty_like(parts[1]), torch.empty_like(parts[2]))
    length, size = _longest(plan), heads[2]
    sums = heads[0] // heads[1] * length * size  # of the gradients of a group of heads
    panels = 3 * block() * size // 2 if length else 0
    room = grad.new_empty(sums + panels, dtype=torch.float32)
    backward_kernel_(*grads, room, grad, log_sum, delta, *parts, *_split(plan), *heads, window, scale)
    return grads


def _longest(plan: Plan) -> int:
    """Return the length of the longest document that all threads compute together; 0 where there is none."""
    return max((length for _, length in plan.buckets if length > block()), default=0)


def _split(plan: Plan) -> tuple[list[int], list[int]]:
    return [count for count, _ in plan.buckets], [length for _, length in plan.buckets]


def pairs_of(counts: Sequence[int], lengths: Sequence[int], window: int) -> int:
    """Return the pairs of a query and a key that it sees in so many documents of these lengths."""

    def triangle(length: int) -> int:
        return length * (length + 1) // 2

    hidden = [triangle(max(0, length - window)) if window else 0 for length in lengths]
    return sum(count * (triangle(length) - out) for count, length, out in zip(counts, lengths, hidden, strict=True))
