"""Host memory that was freed but not given back.

Rows of ever different lengths make glibc's allocator keep holes between its blocks: a training of a 4M-parameter model
on CPU grew from 0.8 to 2.1 GiB resident within 80 steps, without a leak. `malloc_trim` gives whole free pages back.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache

TRIM_EVERY_STEPS = 10


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, or None on systems whose C library has none."""
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    return trim  # noqa: RET504 - ctypes' functions are untyped


def give_back_free_memory() -> None:
    """Return free pages of the heap to the system, where the C library can."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
