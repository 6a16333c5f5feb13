"""Paths as users write them, and the folder of what is kept between runs."""

from __future__ import annotations

import os
import os.path
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """Return the path with "~" replaced; a "~name" of no user stays as it is, where pathlib's own would raise."""
    return Path(os.path.expanduser(text))


def cache_folder() -> Path:
    """Return tunewise's folder in the user's cache directory; `TUNEWISE_CACHE` names another one."""
    chosen = os.environ.get("TUNEWISE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunewise"
