"""Run Python that a model wrote, without harm: a process of its own that cannot start others, write or reach anything.

What it may do is decided by `sandbox_child.py`, in the process itself and before the first foreign line. Here: it is
started without environment in an empty folder and a session of its own, its output goes nowhere, only a short result is
read, and it is killed when its time is up. Linux on x86-64 and arm64; elsewhere it is an error, never an unsafe run.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunewise.errors import InputError
from tunewise.quality.sandbox_child import ARCHITECTURES

Outcome = Literal["passed", "failed", "timed out"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_SECONDS = 5.0
"""What the process may take to start, on a busy machine, beyond the code's own time."""


@dataclass(frozen=True)
class Limits:
    """What generated code may use: wall-clock and processor seconds, and bytes of address space."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20


@dataclass(frozen=True)
class Execution:
    """What came of it: `detail` is the exception's name and words, or how the process ended."""

    outcome: Outcome
    detail: str = ""


def require_sandbox() -> None:
    """Say when this machine cannot run foreign code safely.

    Raises:
        InputError: no Linux, or a processor whose system calls are not known here.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise InputError(
            f"Generated code is only run behind Linux's seccomp on {' or '.join(ARCHITECTURES)}, and this is "
            f"{sys.platform} on {platform.machine()}. Measure pass@1 in a Linux machine or container."
        )


def run_python(code: str, limits: Limits | None = None) -> Execution:
    """Run `code` to its end; it passes when its last line is reached without an exception.

    Args:
        code: a whole program, with the tests that must hold (`assert ...`) at its end.
        limits: of time and memory.

    Raises:
        InputError: this machine cannot run it safely.
    """
    require_sandbox()
    limits = limits or Limits()
    token = secrets.token_hex(16)
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="tunewise-sandbox-") as folder:
            ended = _run(code, limits, token, writing, folder)
        os.set_blocking(reading, False)
        said = b""
        with suppress(BlockingIOError):
            said = os.read(reading, 1024)
    finally:
        os.close(reading)
        os.close(writing)
    if ended is None:
        return Execution("timed out", f"longer than {limits.seconds:g} s")
    if said.decode("utf-8", "replace") == token:
        return Execution("passed")
    if ended == _NO_FILTER:
        raise InputError("This kernel offers no seccomp filter, so generated code cannot be run safely.")
    return Execution("failed", said.decode("utf-8", "replace") or _how(ended))


_NO_FILTER = 3


def _run(code: str, limits: Limits, token: str, result: int, folder: str) -> int | None:
    """Start the process, wait, and leave nothing of it; None when its time was up."""
    order = {
        "code": code,
        "token": token,
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "result": result,
    }
    process = subprocess.Popen(
        [sys.executable, "-I", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        pass_fds=(result,),
        start_new_session=True,
    )
    try:
        process.communicate(json.dumps(order).encode(), timeout=limits.seconds + _START_SECONDS)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _how(returncode: int) -> str:
    return f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"left with code {returncode}"
