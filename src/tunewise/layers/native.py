"""Compiles the kernels with the machine's own C++ compiler, once, and calls it.

The library is kept in the user's cache under a name that depends on source, compiler and processor, and comes to that
name whole: several processes may compile at once, and the last one's is as good as the first one's. Its threads are
torch's: both link libgomp.so.1, and torch's is loaded first. Nothing is compiled where nobody asks for it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunewise.errors import Conflict

SOURCES = tuple(
    Path(__file__).with_name(f"kernels{name}.cpp")
    for name in ("", "_rounding", "_int8", "_documents", "_attention", "_thin")
)
HEADERS = tuple(
    Path(__file__).with_name(f"{name}.h") for name in ("numbers", "vectors", "panels", "pairs", "attention")
)
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
LIBRARIES = ("-lstdc++",)
"""Named, because CXX may be a C compiler's driver, which compiles C++ but does not link its library."""

SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""The dtypes that the kernels know."""


def compiler() -> str | None:
    """Return the C++ compiler: the one in the environment variable CXX, else the first that is found."""
    named = os.environ.get("CXX")
    return next(filter(None, (shutil.which(name) for name in ((named,) if named else COMPILERS))), None)


@functools.cache
def why_not() -> str | None:
    """Say why this machine cannot have the kernels, or return None; where it must, the first call compiles them."""
    try:
        library()
    except Conflict as reason:
        return str(reason)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Compile the kernels, or find them compiled, and load them.

    Raises:
        Conflict: there is no C++ compiler, it cannot compile them, or there is no place for what it makes.
    """
    found = compiler()
    if found is None:
        raise Conflict(
            "fused: its kernels are compiled on this machine, and there is no C++ compiler. Install one (Debian, "
            "Ubuntu: apt install g++), name one in the environment variable CXX, or leave 'fused' out."
        )
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    content = "\n".join(
        (
            *(file.read_text(encoding="utf-8") for file in (*HEADERS, *SOURCES)),
            *FLAGS,
            *LIBRARIES,
            version,
            platform.machine(),
            _processor(),
        )
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunewise" / "kernels"
    place = cache / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    try:
        if place.is_file():
            try:
                return ctypes.CDLL(str(place))
            except OSError:  # a file that was damaged since is made again
                place.unlink(missing_ok=True)
        _compile(found, place)
        return ctypes.CDLL(str(place))
    except OSError as error:
        raise Conflict(
            f"fused: the compiled kernels cannot be kept in {cache} ({error.strerror or error}). Name another folder "
            "in the environment variable XDG_CACHE_HOME, or leave 'fused' out."
        ) from None


def _processor() -> str:
    """What "-march=native" depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(found: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as name:
        made = Path(name) / "kernels.so"
        done = subprocess.run(
            [found, *FLAGS, *map(str, SOURCES), *LIBRARIES, "-o", str(made)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300])
            raise Conflict(f"fused: {found} cannot compile the kernels: {first.strip()}. Leave 'fused' out.")
        made.replace(place)


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel: tensors as the addresses of their numbers (None: a null pointer), ints as int64."""
    function: Any = getattr(library(), f"{name}_{SUFFIXES[dtype]}")
    function.restype = None
    function(*map(argument, arguments))


def argument(value: Tensor | int | float | None) -> Any:
    """Return what a kernel is called with."""
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)
