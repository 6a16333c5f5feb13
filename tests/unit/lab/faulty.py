"""Jobs that end in every way a trial can end in; the executor's server imports them by name."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tunewise.errors import DoesNotFit, InputError
from tunewise.lab.outcome import Measurement


def succeed(loss: float = 1.0) -> Measurement:
    """A trial as it should be."""
    return Measurement(loss=loss)


def process() -> Measurement:
    """Tell who runs it."""
    return Measurement(steps=os.getpid(), tokens=os.getppid())


def hang() -> Measurement:
    """Never end."""
    time.sleep(3600)
    return succeed()


def hang_with_child(file: str) -> Measurement:
    """Never end, and leave a process behind that would write a file."""
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(3); open({file!r}, 'w')"])
    return hang()


def crash() -> Measurement:
    """Crash the interpreter."""
    ctypes.string_at(0)
    return succeed()


def vanish() -> Measurement:
    """Be killed, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return succeed()


def leave() -> Measurement:
    """Leave without an outcome."""
    sys.exit(7)


def run_out_of_memory(num_bytes: int) -> Measurement:
    """Allocate more than there is."""
    kept = [torch.ones(2**20) for _ in range(num_bytes // 2**22)]
    return Measurement(steps=len(kept))


def not_fit() -> Measurement:
    """The engine's own word for it."""
    raise DoesNotFit("one row of 8 tokens does not fit")


def wrong_input() -> Measurement:
    """An error of the user's."""
    raise InputError("there is no such thing")


def break_down() -> Measurement:
    """A bug."""
    raise ValueError("a bug in a method")


def fill_disk(folder: str) -> Measurement:
    """Write until the disk is full, into the folder that is removed afterwards."""
    work = Path(folder) / "work"
    work.mkdir()
    with (work / "large").open("wb") as file:
        while True:
            file.write(bytes(2**20))
            file.flush()


def tamper() -> Measurement:
    """Change the process's state, which the next trial must not see."""
    os.environ["TUNEWISE_TAMPERED"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    return succeed()


def untouched() -> Measurement:
    """Say whether anything of `tamper` is left."""
    is_clean = "TUNEWISE_TAMPERED" not in os.environ and torch.get_default_dtype() is torch.float32
    return Measurement(steps=int(is_clean))


def threads() -> Measurement:
    """Compute on all cores, which a fork from a process with threads would not survive."""
    product = torch.ones(512, 512) @ torch.ones(512, 512)
    return Measurement(loss=float(product.sum()))
