"""What was traced before, kept on disk: JSON files that anyone may read and delete.

A key is the hash of everything the answer depends on, the versions and tunewise's own source included, so a stale
answer is never found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from tunewise.workload.places import cache_folder

SOURCES = ("engine/*.py", "layers/*.py", "methods/*.py", "workload/*.py", "planner/footprint.py", "planner/plain.py")
"""The code that decides about a trace."""


@cache
def source_digest() -> str:
    """Return a hash of the source code that makes traces."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(package.glob(pattern)):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def key_of(content: Mapping[str, Any]) -> str:
    """Return the key of an answer that depends on `content` (plain data) and on the versions."""
    versions = [torch.__version__, transformers.__version__, source_digest()]
    return hashlib.sha256(json.dumps([versions, content], sort_keys=True, default=str).encode()).hexdigest()[:24]


def read(key: str) -> Any | None:
    """Return what was kept under `key`, or None; a damaged file counts as none."""
    try:
        return json.loads((cache_folder() / "traces" / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(key: str, answer: Any) -> None:
    """Keep `answer` (plain data) under `key`; where nothing can be written, nothing is kept."""
    folder = cache_folder() / "traces"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(answer, file, separators=(",", ":"))
        os.replace(file.name, folder / f"{key}.json")
    except OSError:
        return
