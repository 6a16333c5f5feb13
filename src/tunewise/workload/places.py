"""Paths as users write them."""

from __future__ import annotations

import os.path
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """Return the path with "~" replaced; a "~name" of no user stays as it is, where pathlib's own would raise."""
    return Path(os.path.expanduser(text))
