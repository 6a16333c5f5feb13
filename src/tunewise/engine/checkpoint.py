"""Checkpoints that survive everything: written aside, synced, renamed, verified by hash before they are read.

A checkpoint is a folder `step-00000120/` with

    tensors.safetensors   trainable weights, optimizer state, random states
    state.json            everything that is no tensor
    manifest.json         SHA-256 and size of the two, written last

It appears under its name only when all of it is on the disk, so a kill at any moment leaves the older ones intact and
at most a folder `.partial-*` that the next save removes. One that replaces another of the same step puts that aside
first, under a name (`.replaced-*`) by which it is found as long as the new one is not there. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunewise.errors import CheckpointError, StorageError

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"(?:\.replaced-)?step-(\d{8,})")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}
_STORAGE_ERRNOS = {*_FULL, *_IN_THE_WAY, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every finished checkpoint, oldest first."""
    paths = [*folder.glob(".replaced-step-*"), *folder.glob("step-*")]  # of one step the regular name counts
    return sorted({int(match[1]): path for path in paths if (match := _NAME.fullmatch(path.name))}.items())


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` into `folder` and return its path.

    Raises:
        StorageError: the disk is full or read-only; the older checkpoints are untouched.
    """
    final = folder / checkpoint_name(step)
    aside, replaced = (folder / f".{word}-{checkpoint_name(step)}" for word in ("partial", "replaced"))
    with storage_errors(f"cannot write the checkpoint of step {step} to {folder}", kept=_kept(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        aside.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / TENSORS)
        (aside / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {name: _describe(aside / name) for name in (TENSORS, STATE)}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (TENSORS, STATE, MANIFEST):
            _sync(aside / name)
        _sync(aside)
        if final.exists():  # the same step saved before: since then evaluated, or resumed from an older checkpoint
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        aside.rename(final)
        _sync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint's tensors and state after checking every byte against its manifest.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in (TENSORS, STATE):
            if _describe(path / name) != manifest[name]:
                raise CheckpointError(f"{path / name} is damaged: its content differs from what was saved.")
        return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}") from error


def newest_intact(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any], list[str]]:
    """Load the newest checkpoint that is intact; return also what was wrong with newer ones.

    Raises:
        CheckpointError: there is none.
    """
    problems: list[str] = []
    for _, path in reversed(list_checkpoints(folder)):
        try:
            tensors, state = load_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return path, tensors, state, problems
    detail = "\n  ".join(["", *problems])
    raise CheckpointError(f"There is no intact checkpoint in {folder}.{detail}")


def remove_old(folder: Path, keep: int, keep_also: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one of step `keep_also`."""
    for step, path in list_checkpoints(folder)[:-keep]:
        if step != keep_also:
            shutil.rmtree(path)


@contextmanager
def storage_errors(doing: str, kept: str = "") -> Iterator[None]:
    """Turn the operating system's refusals to write into a `StorageError` that says what was kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, OSError) and number not in _STORAGE_ERRNOS:
            raise
        advice = "Free some space and resume." if number in {*_FULL, None} else "Check its permissions."
        if number in _IN_THE_WAY:
            advice = "A file is in the way; move it, or choose another folder."
        raise StorageError(f"{doing}: {error}. {advice}{kept}") from error


def _kept(folder: Path) -> str:
    present = list_checkpoints(folder) if folder.is_dir() else []
    return f" The last good checkpoint is {present[-1][1]}." if present else ""


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path)


def _describe(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return {"sha256": digest.hexdigest(), "num_bytes": file.stat().st_size}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
