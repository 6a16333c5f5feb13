"""Long flat arrays that stay out of the process's own memory: what is large lies in a file without a name.

The system writes pages of such a file out when it needs their memory, so preparing ten million tokens and ten billion
need the same. The files are deleted as they are made and vanish with the arrays.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tunewise.workload.places import cache_folder

LARGE_BYTES = 1 << 22
"""Arrays of more bytes than this lie in files."""

BLOCK = 1 << 20
"""Elements that are worked on at once."""

Number = TypeVar("Number", bound=np.generic)


def _file() -> BinaryIO:
    """Return a file without a name in the cache folder, for /tmp may be memory; where that is not to be had, there."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        return cast(BinaryIO, tempfile.TemporaryFile(dir=cache_folder()))
    except OSError:
        return cast(BinaryIO, tempfile.TemporaryFile())


def room(count: int, dtype: type[Number]) -> NDArray[Number]:
    """Return an array of `count` elements to be written, in memory or in a file."""
    if count * np.dtype(dtype).itemsize <= LARGE_BYTES:
        return np.empty(count, dtype=dtype)
    with _file() as file:
        return np.asarray(np.memmap(file, dtype=dtype, mode="w+", shape=(count,)))


class Growing:
    """A flat array that is written piece by piece."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = np.dtype(dtype)
        self._file: BinaryIO | None = None
        self._pieces: list[NDArray[Any]] = []
        self._held = 0

    def add(self, piece: NDArray[Any]) -> None:
        """Append a piece of the same dtype."""
        self._pieces.append(np.ascontiguousarray(piece, dtype=self._dtype))
        self._held += self._pieces[-1].nbytes
        if self._held > LARGE_BYTES:
            self._file = self._file or _file()
            self._write(self._file)

    def _write(self, file: BinaryIO) -> None:
        for piece in self._pieces:
            file.write(piece.data)
        self._pieces, self._held = [], 0

    def array(self) -> NDArray[Any]:
        """Return everything that was added; nothing may be added afterwards."""
        if self._file is None:
            return np.concatenate(self._pieces) if self._pieces else np.empty(0, dtype=self._dtype)
        with self._file as file:
            self._write(file)
            file.flush()
            return np.asarray(np.memmap(file, dtype=self._dtype, mode="r"))


def gathered(
    flat_T: NDArray[Number], offsets: NDArray[np.int64], indices_K: NDArray[np.int64]
) -> tuple[NDArray[Number], NDArray[np.int64]]:
    """Return (elements, offsets) of the pieces at `indices_K` of a flat array, in that order.

    Args:
        flat_T: N pieces, end to end.
        offsets: int64 (N + 1,), piece i is `flat_T[offsets[i] : offsets[i + 1]]`.
        indices_K: of the wanted pieces.
    """
    starts_K = offsets[indices_K]
    lengths_K = offsets[indices_K + 1] - starts_K
    made = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths_K)))
    out = room(int(made[-1]), flat_T.dtype.type)
    for part in blocks(made):
        begin, end = int(made[part.start]), int(made[part.stop])
        shift_k = starts_K[part] - made[part]
        out[begin:end] = flat_T[np.arange(begin, end) + np.repeat(shift_k, lengths_K[part])]
    return out, made


def blocks(offsets: NDArray[np.int64]) -> Iterator[slice]:
    """Yield slices of pieces, each of some `BLOCK` elements or of one piece that is longer."""
    first, count = 0, len(offsets) - 1
    while first < count:
        last = int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1
        last = min(max(last, first + 1), count)
        yield slice(first, last)
        first = last


def sums(marks_T: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many marks each piece has, int64 (N,)."""
    counts = np.empty(len(offsets) - 1, dtype=np.int64)
    for part in blocks(offsets):
        begin = int(offsets[part.start])
        held = np.concatenate(([0], np.cumsum(marks_T[begin : int(offsets[part.stop])], dtype=np.int64)))
        counts[part] = np.diff(held[offsets[part.start : part.stop + 1] - begin])
    return counts
