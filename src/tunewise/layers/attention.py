"""Attention inside each document: rows may hold several documents, and no token sees a token of another one.

Other libraries do this with a block-diagonal mask over the whole row, whose work and memory grow with the
square of the row. Here documents of similar length are gathered into a batch and each batch is one causal
attention without a mask: the work is the sum of the squares of the documents. On CUDA in 16 bit it is one
call of the variable-length flash kernel (torch.nn.attention.varlen).

Shape suffixes: R rows, L positions in a row, H heads, D size of a head, P slots of all buckets, T = R * L,
B documents in a bucket.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.varlen import varlen_attn

from tunewise.errors import Conflict

AttentionFunction = Callable[..., tuple[Tensor, None]]
"""What transformers' `AttentionInterface` registers; see `per_document_attention` for its arguments."""

_WITHOUT_EFFECT = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "num_items_in_batch",
        "deterministic",
    }
)
"""Keyword arguments that models pass through to attention and that do not change what it computes."""

_VARLEN_OPTIONS = {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
"""Whether this torch's varlen kernel takes windows and grouped heads (torch 2.10's first version did not)."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the documents of one micro-batch go.

    Attributes:
        buckets: (documents, length) of each bucket; shorter documents in it are padded on the right.
        gather_index: int64, the position in the flattened rows of each slot of each bucket; a padding slot
            repeats its document's first token, which causality hides from all real ones.
        scatter_index: int64, the slot of each position of the flattened rows; P for the padding behind a
            row's documents.
        token: int64, the same as `gather_index`, but -1 for a padding slot.
        start: int64, of each slot: the first slot of its document.
        length: int64, of each slot: how many slots its document has.
        boundaries: int32, where documents (and the padding behind them) begin in the flattened rows, and
            their end.
        longest: the largest distance between boundaries.
    """

    buckets: tuple[tuple[int, int], ...]
    gather_index: Tensor
    scatter_index: Tensor
    token: Tensor
    start: Tensor
    length: Tensor
    boundaries: Tensor
    longest: int


DocumentKernels = Callable[..., Tensor]
"""Query, key and value (T, heads * D), plan, (heads, key heads, D), scale, window -> (T, heads * D)."""


@dataclass
class DocumentLayout:
    """Where the documents of the present micro-batch lie; attention functions close over it.

    The engine sets `lengths` before each forward pass. A plain attribute, not a ContextVar: checkpointing
    recomputes in autograd's own threads on CUDA.

    Attributes:
        lengths: for each row the lengths of its documents from the left; the rest of the row is padding.
            None: each row is one document.
        kernels: computes attention per document in the compiled kernels (`products`), where a method has set it.
        mask_dtype: for the few models that make no block-diagonal mask of restarting positions: the dtype of
            the one they are given, bool (True: visible) or float (added to the scores). None: they are given
            none.
    """

    lengths: tuple[tuple[int, ...], ...] | None = None
    kernels: DocumentKernels | None = None
    mask_dtype: torch.dtype | None = None
    _cached: tuple[object, Plan] | None = field(default=None, init=False, repr=False, compare=False)

    def is_one_document_a_row(self) -> bool:
        """Say whether no row holds more than one document."""
        return self.lengths is None or all(len(row) == 1 for row in self.lengths)

    def is_for(self, rows: int, width: int) -> bool:
        """Say whether these are the lengths of a micro-batch of `rows` rows of `width` positions."""
        return self.lengths is None or (len(self.lengths) == rows and all(sum(row) <= width for row in self.lengths))

    def mask(self, input_ids_RL: Tensor) -> Tensor | None:
        """Return the block-diagonal causal mask, (R, 1, L, L), or None where the model needs none."""
        if self.mask_dtype is None or self.lengths is None or self.is_one_document_a_row():
            return None
        rows, width = input_ids_RL.shape
        document = np.zeros((rows, width), dtype=np.int64)
        for row, row_lengths in enumerate(self.lengths):
            for end in accumulate(row_lengths):
                document[row, end:] += 1
        document_RL = torch.tensor(document).to(input_ids_RL.device)
        is_same_RLL = document_RL[:, :, None] == document_RL[:, None, :]
        visible_R1LL = (is_same_RLL & _visible(width, None, input_ids_RL.device))[:, None]
        if self.mask_dtype == torch.bool:
            return visible_R1LL
        lowest = torch.finfo(self.mask_dtype).min
        return torch.zeros_like(visible_R1LL, dtype=self.mask_dtype).masked_fill(~visible_R1LL, lowest)

    def plan(self, like: Tensor, rows: int, width: int) -> Plan:
        """Return the plan for `rows` rows of `width` positions where `like` lies, made once a micro-batch."""
        lengths = self.lengths if self.lengths is not None else ((width,),) * rows
        key = (lengths, rows, width, like.device, isinstance(like, FakeTensor))
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, _make_plan(lengths, width, like.device))
        return self._cached[1]


def per_document_attention(layout: DocumentLayout, use_varlen: bool = False) -> AttentionFunction:
    """Return an attention function for transformers' `AttentionInterface` that stays inside documents.

    Args:
        layout: read at each call.
        use_varlen: use the variable-length flash kernel where it can compute what is asked (16 bit, no
            dropout, no softcap, a head size that it has), which is the same mathematics; on a CPU only with
            fake tensors.
    """

    def attend(
        module: nn.Module,
        query_RHLD: Tensor,
        key_RHLD: Tensor,
        value_RHLD: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return ((R, L, H, D), None); key and value may have fewer heads (grouped queries).

        Raises:
            Conflict: something is asked that this attention does not compute.
        """
        _check(module, query_RHLD, key_RHLD, attention_mask, kwargs, layout)
        options = _Options(dropout, scaling, sliding_window, softcap)
        rows, heads, width, size = query_RHLD.shape
        if layout.kernels is not None and options.kernels_can(query_RHLD, key_RHLD, value_RHLD):
            plan = layout.plan(query_RHLD, rows, width)
            flat = (_flat(part).flatten(1) for part in (query_RHLD, key_RHLD, value_RHLD))
            scale = size**-0.5 if scaling is None else scaling
            output_TX = layout.kernels(*flat, plan, (heads, key_RHLD.shape[1], size), scale, sliding_window or 0)
            return output_TX.view(rows, width, heads, size), None
        if layout.is_one_document_a_row():
            return options.attend(query_RHLD, key_RHLD, value_RHLD).transpose(1, 2).contiguous(), None
        plan = layout.plan(query_RHLD, rows, width)
        if use_varlen and options.varlen_can(query_RHLD, key_RHLD, value_RHLD):
            return _varlen(plan, options, query_RHLD, key_RHLD, value_RHLD), None
        return _bucketed(plan, options, query_RHLD, key_RHLD, value_RHLD), None

    return attend


@dataclass(frozen=True)
class _Options:
    dropout: float
    scaling: float | None
    window: int | None
    softcap: float | None

    def attend(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor) -> Tensor:
        """Causal attention of a batch of documents, (B, H, L, D)."""
        length = query_BHLD.shape[2]
        is_cut = self.window is not None and length > self.window
        if self.softcap is not None:
            return self._softcapped(query_BHLD, key_BHLD, value_BHLD)
        mask_LL = _visible(length, self.window, query_BHLD.device) if is_cut else None
        groups = query_BHLD.shape[1] // key_BHLD.shape[1]
        if groups > 1 and mask_LL is not None:
            # With a mask, CUDA's memory-efficient kernel has no grouped heads and torch would fall back to
            # plain math.
            key_BHLD, value_BHLD = (part.repeat_interleave(groups, dim=1) for part in (key_BHLD, value_BHLD))
        return F.scaled_dot_product_attention(
            query_BHLD,
            key_BHLD,
            value_BHLD,
            attn_mask=mask_LL,
            dropout_p=self.dropout,
            is_causal=mask_LL is None,
            scale=self.scaling,
            enable_gqa=key_BHLD.shape[1] != query_BHLD.shape[1],
        )

    def _softcapped(self, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor) -> Tensor:
        """Scores pass through softcap * tanh(scores / softcap), as in Gemma 2 (arXiv 2408.00118)."""
        assert self.softcap is not None
        groups = query_BHLD.shape[1] // key_BHLD.shape[1]
        if groups > 1:
            key_BHLD, value_BHLD = (part.repeat_interleave(groups, dim=1) for part in (key_BHLD, value_BHLD))
        scaling = query_BHLD.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores_BHLL = query_BHLD @ key_BHLD.transpose(2, 3) * scaling
        scores_BHLL = self.softcap * torch.tanh(scores_BHLL / self.softcap)
        visible_LL = _visible(query_BHLD.shape[2], self.window, query_BHLD.device)
        scores_BHLL = scores_BHLL.masked_fill(~visible_LL, -torch.inf)
        weights_BHLL = F.softmax(scores_BHLL, dim=-1, dtype=torch.float32).to(value_BHLD.dtype)
        return F.dropout(weights_BHLL, self.dropout) @ value_BHLD

    def kernels_can(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Say whether the compiled kernels compute what is asked: on the CPU, in fp32 or bf16, without extras."""
        same = query.dtype == key.dtype == value.dtype and query.dtype in (torch.float32, torch.bfloat16)
        is_plain = self.dropout == 0.0 and self.softcap is None and value.shape[-1] == query.shape[-1]
        return same and is_plain and query.device.type == "cpu"

    def varlen_can(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Say whether the variable-length flash kernel computes what is asked."""
        size = query.shape[-1]
        is_16_bit = query.dtype in (torch.bfloat16, torch.float16) and query.dtype == key.dtype == value.dtype
        has_kernel = query.is_cuda or isinstance(query, FakeTensor)
        is_plain = self.dropout == 0.0 and self.softcap is None and value.shape[-1] == size
        return _VARLEN_OPTIONS and has_kernel and is_16_bit and is_plain and size % 8 == 0 and size <= 256


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
    layout: DocumentLayout,
) -> None:
    if kwargs.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise Conflict("Attention per document is causal, and this model's is not. Use attention: sdpa.")
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT)
    if unknown:
        raise Conflict(
            f"Attention per document does not know the argument '{unknown[0]}' that {type(module).__name__} "
            "passes. Use attention: sdpa or eager."
        )
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise Conflict(
            "Attention per document takes neither a mask nor a cache: it is made for training. "
            "To generate, set the model's attention implementation to 'sdpa' or 'eager'."
        )
    rows, width = query.shape[0], query.shape[2]
    lengths = layout.lengths
    if lengths is not None and (len(lengths) != rows or any(sum(row) > width for row in lengths)):
        raise ValueError(
            f"the layout has {len(lengths)} rows of up to {max(sum(row) for row in lengths)} tokens, "
            f"the input {rows} of {width}; set DocumentLayout.lengths to this micro-batch's, or to None "
            "for one document a row"
        )


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return bool (L, L): position i sees j when i - window < j <= i."""
    visible_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible_LL if window is None else visible_LL.triu(1 - window)


def _bucketed(plan: Plan, options: _Options, query_RHLD: Tensor, key_RHLD: Tensor, value_RHLD: Tensor) -> Tensor:
    rows, heads, width, _ = query_RHLD.shape
    sizes = [count * length for count, length in plan.buckets]
    gathered = [
        _flat(part).index_select(0, plan.gather_index).split(sizes) for part in (query_RHLD, key_RHLD, value_RHLD)
    ]
    outputs = []
    for (count, length), *parts in zip(plan.buckets, *gathered, strict=True):
        query, key, value = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        outputs.append(options.attend(query, key, value).transpose(1, 2).flatten(0, 1))
    # One index for all buckets: a slice for each document would make backward write a full-size gradient for
    # each.
    zero_for_padding = outputs[0].new_zeros(1, heads, value_RHLD.shape[-1])
    output_THD = torch.cat([*outputs, zero_for_padding]).index_select(0, plan.scatter_index)
    return output_THD.view(rows, width, *output_THD.shape[1:])


def _varlen(plan: Plan, options: _Options, query_RHLD: Tensor, key_RHLD: Tensor, value_RHLD: Tensor) -> Tensor:
    rows, heads, width, _ = query_RHLD.shape
    is_cut = options.window is not None and plan.longest > options.window
    output_THD = varlen_attn(
        _flat(query_RHLD).contiguous(),
        _flat(key_RHLD).contiguous(),
        _flat(value_RHLD).contiguous(),
        plan.boundaries,
        plan.boundaries,
        plan.longest,
        plan.longest,
        scale=options.scaling,
        window_size=(options.window - 1, 0) if is_cut and options.window is not None else (-1, 0),
        enable_gqa=heads != key_RHLD.shape[1],
    )
    assert isinstance(output_THD, Tensor)
    return output_THD.view(rows, width, *output_THD.shape[1:])


def _flat(part_RHLD: Tensor) -> Tensor:
    return part_RHLD.transpose(1, 2).flatten(0, 1)


def _make_plan(lengths: Sequence[Sequence[int]], width: int, device: torch.device) -> Plan:
    documents: list[tuple[int, int]] = []  # (length, first position in the flattened rows)
    pieces: list[int] = []
    for row, row_lengths in enumerate(lengths):
        starts = accumulate(row_lengths, initial=row * width)
        documents += [(length, start) for length, start in zip(row_lengths, starts, strict=False) if length > 0]
        pieces += [length for length in (*row_lengths, width - sum(row_lengths)) if length > 0]
    buckets = _buckets(sorted(documents, reverse=True))
    num_slots = sum(len(bucket) * bucket[0][0] for bucket in buckets)
    gather = np.empty(num_slots, dtype=np.int64)
    scatter = np.full(len(lengths) * width, num_slots, dtype=np.int64)
    token = np.full(num_slots, -1, dtype=np.int64)
    starts_of, lengths_of = np.empty(num_slots, dtype=np.int64), np.empty(num_slots, dtype=np.int64)
    first_slot = 0
    for bucket in buckets:
        longest = bucket[0][0]
        for length, start in bucket:
            gather[first_slot : first_slot + length] = np.arange(start, start + length)
            gather[first_slot + length : first_slot + longest] = start
            scatter[start : start + length] = np.arange(first_slot, first_slot + length)
            token[first_slot : first_slot + length] = np.arange(start, start + length)
            starts_of[first_slot : first_slot + longest] = first_slot
            lengths_of[first_slot : first_slot + longest] = longest
            first_slot += longest
    boundaries = np.asarray([0, *accumulate(pieces)], dtype=np.int32)
    # torch.tensor, not from_numpy: under fake tensors (a dry run) it makes fake ones.
    gather_index, scatter_index, token_P, start_P, length_P, boundary_N = (
        torch.tensor(array).to(device) for array in (gather, scatter, token, starts_of, lengths_of, boundaries)
    )
    return Plan(
        buckets=tuple((len(bucket), bucket[0][0]) for bucket in buckets),
        gather_index=gather_index,
        scatter_index=scatter_index,
        token=token_P,
        start=start_P,
        length=length_P,
        boundaries=boundary_N,
        longest=max(pieces),
    )


def _buckets(longest_first: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group documents whose padding to the longest of their group is an eighth of it at most, or 8 tokens."""
    buckets: list[list[tuple[int, int]]] = []
    for document in longest_first:
        if buckets and buckets[-1][0][0] - document[0] <= max(8, buckets[-1][0][0] // 8):
            buckets[-1].append(document)
        else:
            buckets.append([document])
    return buckets
