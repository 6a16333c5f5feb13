"""Attention inside each document as plain batched matrix products over buckets of documents of similar length.

On a CPU with fast 16-bit products this beats the flash kernel by far: scores are one batched product, their softmax
one pass over the causal half, and the documents' square is small. Nothing of that size is kept: the backward pass makes
the scores again, and long documents go through in blocks of queries, so the scores in memory stay bounded. Where the
processor can, one kernel takes their place (`document_kernel`).

    P = softmax(scale Q K^T)    O = P V
    dV = P^T dO    dS = scale P (dO V^T - sum(P dO V^T))    dQ = dS K    dK = dS^T Q

Shape suffixes: T tokens, P slots of all buckets, H heads, K heads of keys and values, G heads that share one of them
(H = K G), L positions of a document, D size of a head, C documents at once, N = C K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunewise.layers import document_kernel
from tunewise.layers.attention import Plan
from tunewise.layers.fused import define
from tunewise.layers.native import call

SCORES = 1 << 22
"""At most so many scores are in memory at once (a row of queries at least `FEWEST_QUERIES` high)."""

FEWEST_QUERIES = 128


def _gather(
    rows_TX: Tensor, cos_TD: Tensor | None, sin_TD: Tensor | None, token_P: Tensor, start_P: Tensor, length_P: Tensor,
    heads: int, size: int,
) -> Tensor:  # fmt: skip
    out = rows_TX.new_empty(len(token_P) * heads * size)
    places = (token_P, start_P, length_P, len(token_P), heads, size)
    call("gather", rows_TX.dtype, rows_TX, rows_TX.stride(0), out, cos_TD, sin_TD, *places)
    return out


def _scatter(
    slots: Tensor, cos_TD: Tensor | None, sin_TD: Tensor | None, slot_T: Tensor, start_P: Tensor, length_P: Tensor,
    heads: int, size: int,
) -> Tensor:  # fmt: skip
    rows_TX = slots.new_empty(len(slot_T), heads * size)
    places = (slot_T, start_P, length_P, len(start_P), len(slot_T), heads, size)
    call("scatter", slots.dtype, slots, rows_TX, rows_TX.stride(0), cos_TD, sin_TD, *places)
    return rows_TX


def _softmax_(scores: Tensor, log_sum: Tensor, queries: int, first: int, window: int, scale: float) -> None:
    rows, keys = scores.numel() // scores.shape[-1], scores.shape[-1]
    call("causal_softmax", scores.dtype, scores, log_sum, rows, keys, queries, first, window, scale)


def _softmax_backward_(
    scores: Tensor, grad: Tensor, log_sum: Tensor, queries: int, first: int, window: int, scale: float
) -> None:
    rows, keys = scores.numel() // scores.shape[-1], scores.shape[-1]
    call("causal_softmax_backward", scores.dtype, scores, grad, log_sum, rows, keys, queries, first, window, scale)


gather = define(
    "gather(Tensor rows, Tensor? cos, Tensor? sin, Tensor token, Tensor start, Tensor length, int heads, int size)"
    " -> Tensor",
    _gather,
    lambda rows, cos, sin, token, start, length, heads, size: rows.new_empty(len(token) * heads * size),
)
scatter = define(
    "scatter(Tensor slots, Tensor? cos, Tensor? sin, Tensor slot, Tensor start, Tensor length, int heads, int size)"
    " -> Tensor",
    _scatter,
    lambda slots, cos, sin, slot, start, length, heads, size: slots.new_empty(len(slot), heads * size),
)
softmax_ = define(
    "causal_softmax_(Tensor(a!) scores, Tensor(b!) log_sum, int queries, int first, int window, float scale) -> ()",
    _softmax_,
    lambda scores, log_sum, queries, first, window, scale: None,
)
softmax_backward_ = define(
    "causal_softmax_backward_(Tensor(a!) scores, Tensor(b!) grad, Tensor log_sum, int queries, int first, int window,"
    " float scale) -> ()",
    _softmax_backward_,
    lambda scores, grad, log_sum, queries, first, window, scale: None,
)


class Block(NamedTuple):
    """Some documents of a bucket, or some queries of one.

    Attributes:
        slots: the slots of the documents.
        documents: C.
        length: L.
        first, end: which positions ask.
        rows: where the logarithms of this block's sums lie.
    """

    slots: slice
    documents: int
    length: int
    first: int
    end: int
    rows: slice


def blocks_of(plan: Plan, heads: int) -> Iterator[Block]:
    """Yield the blocks in which the documents of a plan are computed."""
    first_slot = first_row = 0
    for count, length in plan.buckets:
        at_once = max(1, min(count, SCORES // (heads * length * length)))
        queries = length
        if heads * length * length > SCORES:
            queries = min(length, max(FEWEST_QUERIES, SCORES // (heads * length)))
        for document in range(0, count, at_once):
            held = min(at_once, count - document)
            slots = slice(first_slot, first_slot + held * length)
            for first in range(0, length, queries):
                end = min(first + queries, length)
                rows = slice(first_row, first_row + held * heads * (end - first))
                yield Block(slots, held, length, first, end, rows)
                first_row = rows.stop
            first_slot = slots.stop


class Heads(NamedTuple):
    """Heads of queries, heads of keys and values, size of a head."""

    queries: int
    keys: int
    size: int


class DocumentAttention(torch.autograd.Function):
    """Rows of tokens in, rows of tokens out; keeps queries, keys and values (turned and sorted) and a number a row.

    The kernel's backward pass needs the output too, which the projection behind it keeps anyway where it is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_TX: Tensor,
        key_TX: Tensor,
        value_TX: Tensor,
        cos_TD: Tensor | None,
        sin_TD: Tensor | None,
        plan: Plan,
        heads: Heads,
        scale: float,
        window: int,
    ) -> Tensor:
        """Return (T, H * D).

        Args:
            ctx: autograd's.
            query_TX, key_TX, value_TX: (T, heads * D), heads side by side; the last dimension is dense.
            cos_TD, sin_TD: the rotary positions of queries and keys, or None where they are turned already.
            plan: where the documents lie.
            heads: how many heads there are.
            scale: factor on the scores.
            window: how many positions back a query sees, itself included; 0 means all.
        """
        places = (plan.token, plan.start, plan.length)
        query = gather(query_TX, cos_TD, sin_TD, *places, heads.queries, heads.size)
        key = gather(key_TX, cos_TD, sin_TD, *places, heads.keys, heads.size)
        value = gather(value_TX, None, None, *places, heads.keys, heads.size)
        has_kernel = document_kernel.can_attend(heads.size, query.dtype)
        compute = document_kernel.forward if has_kernel else forward_products
        output, log_sum = compute(query, key, value, plan, heads, window, scale)
        rows: Tensor = scatter(
            output, None, None, plan.scatter_index, plan.start, plan.length, heads.queries, heads.size
        )
        ctx.save_for_backward(query, key, value, log_sum, cos_TD, sin_TD, rows if has_kernel else None)
        ctx.plan, ctx.heads, ctx.scale, ctx.window = plan, heads, scale, window
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        query, key, value, log_sum, cos_TD, sin_TD, rows = ctx.saved_tensors
        plan, heads = ctx.plan, ctx.heads
        places = (plan.start, plan.length)
        to_rows = (plan.scatter_index, *places)
        grad_TX = grad_outputs[0]
        grad_TX = grad_TX if grad_TX.stride(-1) == 1 else grad_TX.contiguous()
        grad = gather(grad_TX, None, None, plan.token, *places, heads.queries, heads.size)
        rest = ((query, key, value), plan, heads, ctx.window, ctx.scale)
        if rows is None:
            grads = backward_products(grad, log_sum, *rest)
        else:
            delta = document_kernel.dots(grad_TX, rows, *to_rows, heads.queries, heads.size)
            grads = document_kernel.backward(grad, log_sum, delta, *rest)
        return (
            scatter(grads[0], cos_TD, sin_TD, *to_rows, heads.queries, heads.size),
            scatter(grads[1], cos_TD, sin_TD, *to_rows, heads.keys, heads.size),
            scatter(grads[2], None, None, *to_rows, heads.keys, heads.size),
            *(None,) * 6,
        )


def forward_products(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, heads: Heads, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, flat like the queries, and the logarithms of the softmax's sums, fp32 (P * H)."""
    log_sum = query.new_empty(len(plan.start) * heads.queries, dtype=torch.float32)
    output = torch.empty_like(query)
    blocks = list(blocks_of(plan, heads.queries))
    room = query.new_empty(_room(blocks, heads))
    for block in blocks:
        q, k, v = _asked(query, block, heads), _keys(key, block, heads), _keys(value, block, heads)
        scores = _scores(room, q, k)
        softmax_(scores, log_sum[block.rows], block.end - block.first, block.first, window, scale)
        _put(output, block, heads, torch.bmm(scores, v))
    return output, log_sum


def backward_products(
    grad: Tensor, log_sum: Tensor, parts: Sequence[Tensor], plan: Plan, heads: Heads, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value (`parts`) for the output's, flat as they are."""
    query, key, value = parts
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    blocks = list(blocks_of(plan, heads.queries))
    room, second = query.new_empty(_room(blocks, heads)), query.new_empty(_room(blocks, heads))
    sums: tuple[Tensor, Tensor] | None = None
    for block in blocks:
        q, k, v = _asked(query, block, heads), _keys(key, block, heads), _keys(value, block, heads)
        g = _asked(grad, block, heads)
        scores, slope = _scores(room, q, k), _scores(second, g, v)
        asked = block.end - block.first
        softmax_backward_(scores, slope, log_sum[block.rows], asked, block.first, window, scale)
        _put(grad_query, block, heads, torch.bmm(slope, k))
        if asked == block.length:
            torch.bmm(slope.mT, q, out=_keys(grad_key, block, heads))
            torch.bmm(scores.mT, g, out=_keys(grad_value, block, heads))
            continue
        if sums is None or block.first == 0:
            zeros = k.new_zeros((2, k.shape[0], block.length, heads.size), dtype=torch.float32)
            sums = (zeros[0], zeros[1])
        sums[0][:, : block.end] += torch.bmm(slope.mT, q)
        sums[1][:, : block.end] += torch.bmm(scores.mT, g)
        if block.end == block.length:
            whole = block._replace(first=0)
            _keys(grad_key, whole, heads).copy_(sums[0])
            _keys(grad_value, whole, heads).copy_(sums[1])
    return grad_query, grad_key, grad_value


def _room(blocks: list[Block], heads: Heads) -> int:
    """Return how many scores the largest block has."""
    return max((b.documents * heads.queries * (b.end - b.first) * b.end for b in blocks), default=0)


def _keys(slots: Tensor, block: Block, heads: Heads) -> Tensor:
    """Return the keys (or values) that a block's queries may see, (N, positions, D)."""
    width = heads.keys * heads.size
    held = slots[block.slots.start * width : block.slots.stop * width]
    return held.view(block.documents * heads.keys, block.length, heads.size)[:, : block.end]


def _of_queries(slots: Tensor, block: Block, heads: Heads) -> Tensor:
    """Return a view of a block's queries, (N, G, positions, D)."""
    width = heads.queries * heads.size
    held = slots[block.slots.start * width : block.slots.stop * width]
    groups = heads.queries // heads.keys
    view = held.view(block.documents * heads.keys, groups, block.length, heads.size)
    return view[:, :, block.first : block.end]


def _asked(slots: Tensor, block: Block, heads: Heads) -> Tensor:
    """Return a block's queries with the heads of a group below each other, (N, G * positions, D)."""
    return _of_queries(slots, block, heads).flatten(1, 2)


def _put(slots: Tensor, block: Block, heads: Heads, result: Tensor) -> None:
    """Write what was computed of a block's queries to their places."""
    place = _of_queries(slots, block, heads)
    place.copy_(result.view(place.shape))


def _scores(room: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T, (N, G * positions, keys), in memory that is used again and again."""
    shape = (left.shape[0], left.shape[1], right.shape[1])
    scores = room[: shape[0] * shape[1] * shape[2]].view(shape)
    torch.bmm(left, right.mT, out=scores)
    return scores


def attend(
    query_TX: Tensor,
    key_TX: Tensor,
    value_TX: Tensor,
    plan: Plan,
    heads: tuple[int, int, int],
    scale: float,
    window: int,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return causal attention inside the documents of `plan`, (T, H * D); see `DocumentAttention`."""
    cos_TD, sin_TD = rotary or (None, None)
    output: Tensor = DocumentAttention.apply(
        query_TX, key_TX, value_TX, cos_TD, sin_TD, plan, Heads(*heads), scale, window
    )
    return output
