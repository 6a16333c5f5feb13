"""Importing bitsandbytes, which is optional, takes a second and gives advice about what we do not use."""

from __future__ import annotations

import logging
from typing import Any

from tunewise.errors import MissingBackend


def import_bitsandbytes(what_for: str) -> Any:
    """Import bitsandbytes, which registers its operators with torch, and return it.

    Args:
        what_for: what cannot be done without it, for the error.

    Raises:
        MissingBackend: it is not installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_of_use)
    try:
        import bitsandbytes
        import bitsandbytes.optim
    except ImportError:
        raise MissingBackend("bitsandbytes", what_for, "quantize") from None
    return bitsandbytes


def _is_of_use(record: logging.LogRecord) -> bool:
    """Say no to 0.50's warning, once a process, that the package `kernels` could multiply 4-bit weights: we unpack."""
    return "gemm_4bit_forward" not in str(record.msg)
