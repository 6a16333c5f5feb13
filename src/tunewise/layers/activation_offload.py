"""Activations that wait for backward on a disk or in the host's memory instead of the device's.

`OffloadedActivations` are a context around forward: what autograd saves there goes away through
`torch.autograd.graph.saved_tensors_hooks` and comes back, with the same strides, when backward wants it. Weights and
small tensors stay. A tensor that several operations save is moved once.

    disk     one file without a name, which dies with the process; written in forward, read in backward
    host     pinned memory; the copy runs on a stream of its own beside the computation (CUDA, not measured yet)

On fake tensors (a dry run) nothing is moved: what is offloaded dies and is born again, which is what the device sees.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tunewise.errors import StorageError
from tunewise.layers.linear import has_values
from tunewise.layers.raw_bytes import bytes_of, read_at, write_at

Home = Literal["disk", "host"]


class Kept:
    """A tensor that is elsewhere: what it takes to bring it back."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.strides, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        self.where: Any = None

    def empty(self) -> Tensor:
        """Return a tensor to read into."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


class Place(Protocol):
    """Where tensors wait."""

    def put(self, tensor: Tensor, kept: Kept) -> None:
        """Move a tensor's numbers away."""

    def get(self, kept: Kept) -> Tensor:
        """Return a fresh tensor with these numbers."""


class DiskFile:
    """A file that is written from its front again as soon as nobody waits for anything in it."""

    def __init__(self, folder: str | None) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed with this object)
        except OSError as error:
            raise StorageError(
                f"offload_activations: cannot make a file in {folder or tempfile.gettempdir()}: {error}"
            ) from error
        self._end = self._waiting = 0

    def put(self, tensor: Tensor, kept: Kept) -> None:
        """Write a tensor's numbers in the order in which they lie in memory."""
        content = bytes_of(tensor)
        kept.where = self._end
        try:
            write_at(self._file.fileno(), content, self._end)
        except OSError as error:
            raise StorageError(
                f"offload_activations: cannot write to {tempfile.gettempdir()}: {error}. Name a folder with room in "
                "offload_activations.folder."
            ) from error
        self._end += len(content)
        self._waiting += 1
        weakref.finalize(kept, self._forget)

    def get(self, kept: Kept) -> Tensor:
        """Read it back."""
        tensor = kept.empty()
        try:
            read_at(self._file.fileno(), bytes_of(tensor), kept.where)
        except (OSError, EOFError) as error:
            raise StorageError(f"offload_activations: cannot read activations back: {error}.") from error
        return tensor

    @property
    def num_bytes(self) -> int:
        """Bytes in use."""
        return self._end

    def _forget(self) -> None:
        self._waiting -= 1
        if not self._waiting:
            self._end = 0


class PinnedHost:
    """Page-locked host memory, filled on a stream of its own. CUDA only; not measured yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def put(self, tensor: Tensor, kept: Kept) -> None:
        """Start the copy to the host; the device's memory is free once it is done."""
        pinned = torch.empty_strided(kept.shape, kept.strides, dtype=kept.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            pinned.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        kept.where = (pinned, self._stream.record_event())

    def get(self, kept: Kept) -> Tensor:
        """Copy back on the computation's stream, after the copy away is done."""
        pinned, event = kept.where
        torch.cuda.current_stream(self._device).wait_event(event)
        tensor = kept.empty()
        tensor.copy_(pinned, non_blocking=True)
        return tensor


class OffloadedActivations:
    """What a model's forward passes save for backward, kept in `place`."""

    def __init__(self, model: nn.Module, make_place: Callable[[], Place], min_bytes: int) -> None:
        """Offload what `model` saves.

        Args:
            model: its parameters and buffers stay where they are.
            make_place: where to; made when the first tensor with values comes.
            min_bytes: smaller tensors stay.
        """
        self._model, self._make_place, self._min_bytes = model, make_place, min_bytes
        self._place: Place | None = None
        self._own: set[int] = set()
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[Kept]]] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Offload what autograd saves inside."""
        tensors = (*self._model.parameters(), *self._model.buffers())
        self._own = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._known.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._known.clear()

    def _pack(self, tensor: Tensor) -> Tensor | Kept:
        storage = tensor.untyped_storage()
        is_small = tensor.numel() * tensor.element_size() < self._min_bytes
        if is_small or isinstance(tensor, nn.Parameter) or storage._cdata in self._own or not _is_dense(tensor):
            return tensor
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if key in self._known:
            saved_storage, reference = self._known[key]
            kept = reference()
            if kept is not None and not saved_storage.expired():
                return kept
        kept = Kept(tensor)
        if has_values(tensor):
            if self._place is None:
                self._place = self._make_place()
            self._place.put(tensor.detach(), kept)
        self._known[key] = (StorageWeakRef(storage), weakref.ref(kept))
        return kept

    def _unpack(self, packed: Tensor | Kept) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return packed.empty() if self._place is None or packed.where is None else self._place.get(packed)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills one piece of memory without gaps and overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return tensor.layout == torch.strided and tensor.numel() > 0
