"""The numbers of a tensor as they lie in memory, to and from files that nobody but this process reads."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a dense CPU tensor's memory, to read or to write, in the order in which it lies there."""
    flat = torch.as_strided(tensor.detach(), (tensor.numel(),), (1,), tensor.storage_offset())
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_at(file: int, content: memoryview, place: int) -> None:
    """Write all of `content` to a file descriptor, `place` bytes behind its beginning.

    Raises:
        OSError: the disk is full, or whatever else the system says.
    """
    written = 0
    while written < len(content):
        written += os.pwrite(file, content[written:], place + written)


def read_at(file: int, content: memoryview, place: int) -> None:
    """Fill `content` from a file descriptor, `place` bytes behind its beginning.

    Raises:
        OSError: the system's; EOFError: the file ends before.
    """
    read = 0
    while read < len(content):
        count = os.preadv(file, [content[read:]], place + read)
        if not count:
            raise EOFError("the file has become shorter")
        read += count
