"""Blocks whose frozen weights are on a disk or in the host's memory and on the device only while they compute.

    forward     block i comes, computes, goes
    backward    block i comes when the gradient of its output is there, is computed again (checkpointing), goes when
                block i - 1 comes or backward ends

A tensor that is away is a placeholder: one element spread over the tensor's shape, not-a-number where its dtype knows
that, so that nobody can compute with it unnoticed. Coming and going exchange `tensor.data`; whatever still holds the
numbers (an operation that has not finished) keeps them alive, so going too early is not possible.

On a CPU glibc's allocator is told to give every freed tensor back to the system. It would keep what is smaller than the
largest piece that was ever freed, put small objects in between, and soon hold the whole model's size in holes.

On CUDA the next block is fetched on a stream of its own while one computes (two blocks on the device instead of one;
not measured yet).
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from tunewise.errors import Conflict, StorageError
from tunewise.layers.linear import has_values
from tunewise.layers.raw_bytes import bytes_of, read_at, write_at

Source = Literal["disk", "host"]

M_MMAP_THRESHOLD = -3
"""glibc's name for it, see mallopt(3)."""

MAPPED_BYTES = 2**20
"""Tensors of this size or more have pages of their own, which go back to the system when they are freed."""


@dataclass(eq=False)
class Parked:
    """One tensor of a block that is away.

    Attributes:
        find: returns the tensor as its module has it now (moving a module exchanges its buffers).
        shape, dtype: its own.
        fetch: writes its numbers into a tensor; None: it has none (a dry run).
    """

    find: Callable[[], Tensor]
    shape: torch.Size
    dtype: torch.dtype
    fetch: Callable[[Tensor], None] | None


class Streamer:
    """Keeps the frozen tensors of `blocks` in `source` and brings them to `device` block by block."""

    def __init__(
        self, blocks: dict[str, nn.Module], source: Source, device: torch.device, folder: Path | None = None
    ) -> None:
        """Prepare; nothing is away before `park_inside` and `settle`.

        Args:
            blocks: by name in the model, in the order in which they compute.
            source: "disk" (a file a piece in a folder of its own, removed with the process) or "host".
            device: where blocks compute.
            folder: where that folder is made; None: the system's for temporary files.
        """
        self._blocks = blocks
        self._source, self._device = source, device
        self._parked: dict[str, list[Parked]] = {name: [] for name in blocks}
        self._away: set[int] = set()
        self._present: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []
        self._num_files = 0
        self._has_values = True
        self._side: torch.cuda.Stream | None = None
        self._wanted_folder = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors that are kept elsewhere."""
        return sum(p.shape.numel() * p.dtype.itemsize for parked in self._parked.values() for p in parked)

    def park_inside(self, name: str, module: nn.Module) -> None:
        """Send the tensors of `module` away when it lies inside a block; it is called `name` in the model."""
        block = next((block for block in self._blocks if name == block or name.startswith(block + ".")), None)
        if block is None:
            return
        for owner in module.modules():
            for key, buffer in owner._buffers.items():
                if buffer is not None and buffer._is_view():  # which would keep the numbers of its base
                    owner._buffers[key] = buffer.detach()
        tensors = {
            f"{number}.{key}": (owner, key, is_buffer)
            for number, owner in enumerate(module.modules())
            for is_buffer, own in ((False, owner._parameters), (True, owner._buffers))
            for key, tensor in own.items()
            if tensor is not None and id(tensor) not in self._away and not tensor.requires_grad
        }
        self._park(block, tensors)

    def settle(self, model: nn.Module) -> None:
        """Send away what is left in the blocks, and move everything else to the device.

        The first call comes before adapters are put in, and what they add stays on the device.

        Raises:
            Conflict: something that is away would be trained.
        """
        if not self._handles:
            for name, block in self._blocks.items():
                self.park_inside(name, block)
            self._attach()
        for name, parked in self._parked.items():
            if any(each.find().requires_grad for each in parked):
                raise Conflict(
                    f"stream: weights of '{name}' are trained, so they cannot be streamed. Leave stream out."
                )
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for tensor in own.values():
                    if tensor is not None and id(tensor) not in self._away and has_values(tensor):
                        tensor.data = tensor.data.to(self._device)

    def stop(self) -> None:
        """Bring everything back for good; nothing is streamed any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name in self._blocks:
            self._bring(name)
        self._parked = {name: [] for name in self._blocks}
        self._present.clear()
        self._away.clear()

    def _park(self, block: str, tensors: dict[str, tuple[nn.Module, str, bool]]) -> None:
        def find(owner: nn.Module, key: str, is_buffer: bool) -> Tensor:
            found = (owner._buffers if is_buffer else owner._parameters)[key]
            assert found is not None
            return found

        if not tensors:
            return
        found = {key: find(*place) for key, place in tensors.items()}
        self._has_values = all(map(has_values, found.values()))
        fetches = self._store(found) if self._has_values else dict.fromkeys(found)
        for key, place in tensors.items():
            tensor = found[key]
            self._parked[block].append(Parked(partial(find, *place), tensor.shape, tensor.dtype, fetches[key]))
            self._away.add(id(tensor))
            tensor.data = self._placeholder(tensor)

    def _store(self, tensors: dict[str, Tensor]) -> dict[str, Callable[[Tensor], None] | None]:
        """Put tensors where they wait and return for each how to fetch its numbers."""
        if self._source == "host":
            pins = self._device.type == "cuda"
            waiting = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
            waiting = {key: tensor.pin_memory() if pins else tensor.clone() for key, tensor in waiting.items()}
            return {key: partial(_copy_from, tensor) for key, tensor in waiting.items()}
        try:
            return _write(self._new_file(), tensors)
        except OSError as error:
            place = self._wanted_folder or tempfile.gettempdir()
            raise StorageError(
                f"stream: cannot write weights to {place}: {error}. Name another stream.folder."
            ) from error

    def _new_file(self) -> Path:
        if self._folder is None:
            if self._wanted_folder is not None:
                self._wanted_folder.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="tunewise-blocks-", dir=self._wanted_folder)
            if self._device.type == "cpu":
                _give_freed_memory_back()
        self._num_files += 1
        return Path(self._folder.name) / f"{self._num_files:06d}.weights"

    def _placeholder(self, tensor: Tensor) -> Tensor:
        filler = float("nan") if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else 0
        device = self._device if self._has_values else tensor.device
        return torch.full((), filler, dtype=tensor.dtype, device=device).expand(tensor.shape)

    def _attach(self) -> None:
        names = list(self._blocks)
        for number, (name, block) in enumerate(self._blocks.items()):
            after = names[number + 1] if number + 1 < len(names) else None
            before = names[number - 1] if number else None
            self._handles += [
                block.register_forward_pre_hook(partial(self._before_forward, name, after, before)),
                block.register_forward_hook(partial(self._after_forward, name, before)),
            ]

    def _before_forward(self, name: str, after: str | None, before: str | None, module: nn.Module, args: Any) -> None:
        del module, args
        self._enter(name, before if _is_in_backward() else after)

    def _after_forward(self, name: str, before: str | None, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if _is_in_backward():
            return  # computed again for its backward pass, which still needs the weights
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(partial(self._before_backward, name, before))
        self._send_away(name)

    def _before_backward(self, name: str, before: str | None, gradient: Tensor) -> None:
        del gradient
        self._enter(name, before)
        Variable._execution_engine.queue_callback(self._send_all_away)

    def _enter(self, name: str, next_name: str | None) -> None:
        """Have block `name` on the device, and nothing else but, on CUDA, the block that is wanted next."""
        for other in [other for other in self._present if other not in (name, next_name)]:
            self._send_away(other)
        self._bring(name)
        if self._device.type == "cuda" and next_name is not None:
            self._bring(next_name, ahead=True)

    def _bring(self, name: str, *, ahead: bool = False) -> None:
        if name in self._present:
            if self._side is not None and not ahead:
                torch.cuda.current_stream(self._device).wait_stream(self._side)
            return
        on_side = ahead and self._has_values
        if on_side and self._side is None:
            self._side = torch.cuda.Stream(self._device)
        with torch.no_grad(), torch.cuda.stream(self._side) if on_side and self._side is not None else nullcontext():
            present = [self._fetched(parked) for parked in self._parked[name]]
        if on_side:
            for tensor in present:
                tensor.record_stream(torch.cuda.current_stream(self._device))
        for parked, values in zip(self._parked[name], present, strict=True):
            parked.find().data = values
        self._present[name] = present

    def _fetched(self, parked: Parked) -> Tensor:
        device = self._device if self._has_values else parked.find().device
        values = torch.empty(parked.shape, dtype=parked.dtype, device=device)
        if parked.fetch is not None:
            parked.fetch(values)
        return values

    def _send_away(self, name: str) -> None:
        if self._present.pop(name, None) is not None:
            for parked in self._parked[name]:
                tensor = parked.find()
                tensor.data = self._placeholder(tensor)

    def _send_all_away(self) -> None:
        for name in list(self._present):
            self._send_away(name)


def blocks_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """Return the outermost modules of a kind by name, in the model's order."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, kind) and not _is_inside(name, found):
            found[name] = module
    return found


def _is_inside(name: str, owners: Iterable[str]) -> bool:
    return any(name.startswith(owner + ".") for owner in owners)


def _is_in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _give_freed_memory_back() -> None:
    """For the rest of the process; other systems and C libraries have no such option."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def _copy_from(waiting: Tensor, values: Tensor) -> None:
    values.copy_(waiting, non_blocking=True)


def _write(file: Path, tensors: dict[str, Tensor]) -> dict[str, Callable[[Tensor], None] | None]:
    """Write tensors one behind the other and return for each how to read it.

    No safetensors: it maps the whole file for one tensor, and a block would be in memory twice while it comes.
    """
    places, place = {}, 0
    with file.open("wb", buffering=0) as content:
        for key, tensor in tensors.items():
            numbers = bytes_of(tensor.detach().to("cpu").contiguous())
            write_at(content.fileno(), numbers, place)
            places[key] = place
            place += len(numbers)
    return {key: partial(_read, file, place) for key, place in places.items()}


def _read(file: Path, place: int, values: Tensor) -> None:
    waiting = values if values.device.type == "cpu" else torch.empty_like(values, device="cpu")
    try:
        with file.open("rb", buffering=0) as content:
            read_at(content.fileno(), bytes_of(waiting), place)
    except (OSError, EOFError) as error:
        raise StorageError(f"stream: cannot read weights from {file}: {error}") from error
    if waiting is not values:
        values.copy_(waiting)
