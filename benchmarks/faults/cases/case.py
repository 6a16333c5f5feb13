"""What a bad input is: how it is made in a fresh copy of the workshop, the command, and what must be said about it.

The workshop is a folder with a tiny model (`model/`), good data (`data.jsonl`), and a run that was killed after step 5
of 6 (`run/`, checkpoints of the steps 2 and 4). Each case gets a copy of its own, spoils something in it, and runs one
command in it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants

LINUX_CAPABILITY_VERSION_3 = 0x20080522
"""The version of capset's structures (linux/capability.h)."""

SHORT = ("--set", "training.steps=2", "--set", "device=cpu", "--set", "quality=off")
"""So short that a case that should fail and does not ends soon; nothing good can come of it, so nobody judges it."""


Spoil = Callable[[Path], None]
Around = Callable[[Path, ExitStack], None]

PAGE_BYTES = 4096
"""What a file system in memory gives to a file at a time."""


def leave(folder: Path) -> None:
    """Spoil nothing: the arguments alone are bad."""


def anyone(folder: Path, stack: ExitStack) -> None:
    """Run the command as we are."""


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: "group: what is wrong"; unique.
        arguments: the command line after `tunewise`; the working directory is the case's own folder.
        says: words that the user must see: in the error, or on standard output when the command rightly goes on.
        spoil: makes the bad input in the case's folder.
        around: what surrounds the command alone, in its own process: a lock, a hidden library, a limit.
        prepare: what surrounds command and comparison, in ours: a mounted file system.
        exit_code: 2, or 0 where the command must go on with what is left.
        may_change: patterns of files that the command is meant to change; to `run/metrics.jsonl` any may append.
        begins_run: whether a new run may be begun (it fails while it trains).
        needs: "mount" for a case that only the superuser can try.
    """

    name: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    spoil: Spoil = leave
    around: Around = anyone
    prepare: Around = anyone
    exit_code: int = 2
    may_change: tuple[str, ...] = ()
    begins_run: bool = False
    needs: str = ""


def train(*options: str, data: str = "data.jsonl", model: str = "model") -> tuple[str, ...]:
    """The command that trains two steps into `out/`."""
    return ("train", "--model", model, "--data", data, "--out", "out", *SHORT, *options)


def setting(*settings: str) -> tuple[str, ...]:
    """The same with some fields set."""
    return train(*(word for text in settings for word in ("--set", text)))


def write(name: str, content: str | bytes | list[object]) -> Spoil:
    """Return what writes a file: bytes or text as they are, a list as JSON Lines."""

    def spoil(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif isinstance(content, str):
            file.write_text(content, encoding="utf-8")
        else:
            file.write_text("".join(json.dumps(item) + "\n" for item in content), encoding="utf-8")

    return spoil


def also(*steps: Spoil) -> Spoil:
    """Return what does several things."""

    def spoil(folder: Path) -> None:
        for step in steps:
            step(folder)

    return spoil


def change_json(name: str, **changes: object) -> Spoil:
    """Return what changes fields of a JSON file; a field that is set to `...` is removed."""

    def spoil(folder: Path) -> None:
        file = folder / name
        content = {**json.loads(file.read_text(encoding="utf-8")), **changes}
        content = {key: value for key, value in content.items() if value is not ...}
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")

    return spoil


def remove(*names: str) -> Spoil:
    """Return what removes files and folders, given by patterns."""

    def spoil(folder: Path) -> None:
        for name in names:
            for path in sorted(folder.glob(name)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def truncate(name: str, share: float = 0.5) -> Spoil:
    """Return what cuts a file off."""

    def spoil(folder: Path) -> None:
        os.truncate(folder / name, int((folder / name).stat().st_size * share))

    return spoil


def flip_byte(name: str) -> Spoil:
    """Return what changes the last byte of a file."""

    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 0xFF
        (folder / name).write_bytes(bytes(content))

    return spoil


def without(*libraries: str) -> Around:
    """Return what makes libraries look as if they were not installed."""

    def around(folder: Path, stack: ExitStack) -> None:
        for library in libraries:
            for loaded in [name for name in sys.modules if name.split(".")[0] == library]:
                del sys.modules[loaded]
            sys.modules[library] = None  # type: ignore[assignment]

    return around


def bound(folder: Path, stack: ExitStack) -> None:
    """Run the command as somebody whom permissions bind: root gives up its capabilities (capset, Linux)."""
    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def offline(folder: Path, stack: ExitStack) -> None:
    """Do what HF_HUB_OFFLINE=1 does; without it the library tries again for half a minute."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    with suppress(ImportError):
        importlib.import_module("datasets").config.HF_HUB_OFFLINE = True


def largest_file(num_bytes: int) -> Around:
    """Return what lets no file grow beyond so many bytes, which is how a disk quota shows itself."""

    def around(folder: Path, stack: ExitStack) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return around


def small_disk(name: str, room_bytes: int) -> Around:
    """Return what puts the folder `name` on a file system of its own with so much room left."""

    def prepare(folder: Path, stack: ExitStack) -> None:
        sizes = [file.stat().st_size for file in (folder / name).rglob("*") if file.is_file()]
        used = sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)
        _move_to_disk(folder / name, f"size={used + room_bytes}", stack)

    return prepare


def read_only_disk(name: str) -> Around:
    """Return what puts the folder `name` on a file system of its own that cannot be written."""

    def prepare(folder: Path, stack: ExitStack) -> None:
        _move_to_disk(folder / name, "size=16m", stack)
        subprocess.run(["mount", "-o", "remount,ro", str(folder / name)], check=True)

    return prepare


def _move_to_disk(folder: Path, options: str, stack: ExitStack) -> None:
    files = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
