"""Which tensors are alive when: a dispatch mode that follows every storage from its birth to its death.

Storages, not tensors: a view has no memory of its own. What a storage *is* (a gradient, an activation that is kept for
backward, a temporary) is often known only later, so the tracker writes down events and judges when all is over.

Entered inside a `FakeTensorMode` it sees what the real step would allocate; entered alone it sees the real step.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunewise.engine.fake_tensors import DEVICE
from tunewise.engine.work import WorkTable


class Kind(enum.IntEnum):
    """What bytes are there for; a column of a `Curve`."""

    WEIGHTS = 0
    ADAPTER = 1
    GRADIENTS = 2
    OPTIMIZER = 3
    ACTIVATIONS = 4
    LOGITS = 5
    TEMPORARIES = 6


class Moment(enum.StrEnum):
    """A part of a training run that has a peak of its own."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"
    EVALUATION = "evaluation"
    SAVE = "save"
    MERGE = "merge"


class Place(NamedTuple):
    """Where in the step an event happened.

    Attributes:
        moment: the part of the run.
        part: the number of the micro-batch, from 0.
        block: the transformer block; -1 in front of the first one, None behind the last one or where there are none.
    """

    moment: Moment
    part: int = 0
    block: int | None = None


Curve = NDArray[np.int64]
"""Bytes alive after each event of a place, a row an event (the first row: on entering), a column a `Kind`."""

WorkspaceRule = Callable[[Any, tuple[Any, ...], dict[str, Any]], int]
"""From an operator and its arguments to the bytes that its kernel allocates and frees inside."""


@dataclass(slots=True)
class _Allocation:
    num_bytes: int
    born: int
    place: int
    kind: Kind | None = None
    died: int | None = None
    is_recomputed: bool = False
    is_logits: bool = False


@dataclass(eq=False)
class Tracker(TorchDispatchMode):
    """Follows storages; see the module's docstring.

    Attributes:
        vocab_size: a tensor of two or more dimensions whose last one has this size holds logits; None: no tensor does.
        granularity: the allocator rounds each size up to a multiple of this.
        workspace: what kernels allocate inside, which no dispatch mode can see.
        has_fused_dropout: CUDA's dropout keeps a byte a number, the CPU's (which is traced) factors in full size.
        work: what the operators compute and move.
    """

    vocab_size: int | None = None
    granularity: int = 1
    workspace: WorkspaceRule | None = None
    has_fused_dropout: bool = False
    work: WorkTable = field(default_factory=WorkTable)
    _allocations: list[_Allocation] = field(default_factory=list)
    _events: list[tuple[int, int]] = field(default_factory=list)
    _places: list[tuple[Place, int]] = field(default_factory=list)
    _alive: dict[int, tuple[weakref.ref[Any], int]] = field(default_factory=dict)
    _accumulations: list[tuple[int, int]] = field(default_factory=list)
    _is_open: bool = True

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace == "prim":  # other questions about a tensor
            return output
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for leaf in leaves:
            self._see(leaf)
        if self.has_fused_dropout and func is torch.ops.aten.bernoulli_.float:
            self._resize(self._see(args[0]), args[0].numel())
        if func is torch.ops.aten.add.Tensor:
            self._note_accumulation(args, output)
        if self.workspace is not None and (inside := self.workspace(func, args, kwargs)) > 0:
            self._pulse(inside)
        self.work.add(self._places[-1][0].moment, func, args, kwargs, output, leaves)
        return output

    def enter(self, place: Place) -> None:
        """Say where the following events happen."""
        if not self._places or self._places[-1][0] != place:
            self._places.append((place, len(self._events)))

    @property
    def place(self) -> Place:
        """Where events happen at present."""
        return self._places[-1][0]

    def adopt(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Say what the storages of `tensors` are; those that were there before tracking began are born now."""
        for tensor in tensors:
            allocation = self._allocations[self._see(tensor)]
            if allocation.kind is None:
                allocation.kind = kind

    def close(self) -> None:
        """End tracking; what dies from now on is not written down."""
        self._is_open = False
        self._alive.clear()

    def _see(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            return known[1]
        index = len(self._allocations)
        size = self._rounded(storage.nbytes())
        place = self._places[-1][0]
        allocation = _Allocation(
            num_bytes=size,
            born=len(self._events),
            place=len(self._places) - 1,
            is_recomputed=place.moment == Moment.BACKWARD and torch.is_grad_enabled(),
            is_logits=tensor.ndim >= 2 and tensor.shape[-1] == self.vocab_size,
        )
        self._allocations.append(allocation)
        self._events.append((size, index))
        self._alive[key] = (weakref.ref(storage, partial(self._forget, key)), index)
        return index

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self.granularity) * self.granularity

    def _resize(self, index: int, num_bytes: int) -> None:
        """Let an allocation have had another size from its birth on."""
        allocation = self._allocations[index]
        allocation.num_bytes = self._rounded(num_bytes)
        self._events[allocation.born] = (allocation.num_bytes, index)

    def _forget(self, key: int, reference: object) -> None:
        del reference
        known = self._alive.pop(key, None)
        if known is not None and self._is_open:
            allocation = self._allocations[known[1]]
            allocation.died = len(self._events)
            self._events.append((-allocation.num_bytes, known[1]))

    def _note_accumulation(self, args: tuple[Any, ...], total: Tensor) -> None:
        """Note where autograd adds up two gradients of one tensor.

        It adds in place when nobody else holds the first one, but never under a dispatch mode or with fake tensors
        (`can_accumulate_inplace`, torch/csrc/autograd/input_buffer.cpp). A view holds its base: the gradient of a
        transposed weight, of a head that is tied to the embedding, is one.
        """
        if self._places[-1][0].moment != Moment.BACKWARD or torch.is_grad_enabled():
            return
        first, second = args[:2]
        if first._is_view():
            return
        if isinstance(second, Tensor) and first.shape == second.shape == total.shape and first.dtype == total.dtype:
            self._accumulations.append((self._see(total), self._see(first)))

    def _events_of_the_real_step(self) -> list[tuple[int, int]]:
        """Return the events; where the real addition is in place the first gradient dies before its sum is born."""
        events = list(self._events)
        for total, first in self._accumulations:
            born, died = self._allocations[total].born, self._allocations[first].died
            if died is not None and all(size < 0 for size, _ in events[born + 1 : died + 1]):
                events.insert(born, events.pop(died))
        return events

    def _pulse(self, num_bytes: int) -> None:
        """A kernel's own memory: there and gone again."""
        index, now = len(self._allocations), len(self._events)
        self._allocations.append(_Allocation(num_bytes, now, len(self._places) - 1, Kind.TEMPORARIES, now + 1))
        self._events += [(num_bytes, index), (-num_bytes, index)]

    def curves(self) -> dict[Place, Curve]:
        """Return what was alive at each place, split by kind. Rows of one place are in the order of time."""
        kinds = self._kinds()
        changes = np.zeros((len(self._events) + 1, len(Kind)), dtype=np.int64)
        for time, (size, index) in enumerate(self._events_of_the_real_step()):
            changes[time + 1, kinds[index]] = size
        alive = changes.cumsum(axis=0)
        ends = [start for _, start in self._places[1:]] + [len(self._events)]
        pieces: dict[Place, list[Curve]] = {}
        for (place, start), end in zip(self._places, ends, strict=True):
            pieces.setdefault(place, []).append(alive[start : end + 1])
        return {place: np.concatenate(curves) for place, curves in pieces.items()}

    def _kinds(self) -> list[Kind]:
        forward_ends = self._forward_ends()
        return [self._kind(allocation, forward_ends[allocation.place]) for allocation in self._allocations]

    def _kind(self, allocation: _Allocation, forward_end: int | None) -> Kind:
        if allocation.kind is not None:
            return allocation.kind
        if allocation.is_logits:
            return Kind.LOGITS
        outlives = forward_end is not None and (allocation.died is None or allocation.died > forward_end)
        return Kind.ACTIVATIONS if outlives or allocation.is_recomputed else Kind.TEMPORARIES

    def _forward_ends(self) -> list[int | None]:
        """For each place of a forward pass the time at which that pass ends, for others None."""
        ends: list[int | None] = [None] * len(self._places)
        end = len(self._events)
        for number in range(len(self._places) - 1, -1, -1):
            place, start = self._places[number]
            if place.moment == Moment.FORWARD:
                ends[number] = end
            else:
                end = start
        return ends


@contextmanager
def marking(tracker: Tracker, blocks: list[torch.nn.Module]) -> Iterator[None]:
    """Tell the tracker which of the model's blocks is at work, forward and backward."""
    last = len(blocks) - 1

    def before(index: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        del module
        tracker.enter(tracker.place._replace(block=index))
        hidden = args[0] if args else kwargs.get("hidden_states")
        if index == 0 and isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(partial(entering_backward, -1))

    def after(index: int, module: Any, args: Any, output: Any) -> None:
        del module, args
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(partial(entering_backward, index))
        if index == last:
            tracker.enter(tracker.place._replace(block=None))

    def entering_backward(index: int, gradient: Tensor) -> None:
        del gradient
        tracker.enter(tracker.place._replace(block=index))

    handles = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(partial(before, index), with_kwargs=True))
        handles.append(block.register_forward_hook(partial(after, index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
