"""python -m tunewise.lab.server: imports the heavy modules once, then forks a process for each job.

A job is a line of JSON on standard input,

    {"function": "package.module:name", "arguments": {...}, "folder": "...", "memory_bytes": null}

and the answers are lines on standard output: {"ready": true}, {"started": pid}, {"ended": exit code}. The function
returns a pydantic value, which the child writes to `folder`/outcome.json; what it prints goes to `folder`/log.txt. A
line {"preload": ["package.module", ...]} imports modules that all later jobs will need; it has no answer.

The server has no threads, no CUDA context and computes nothing, so a fork is safe and takes milliseconds. It dies with
its parent, and the children with it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunewise.engine.run_folder import write_whole
from tunewise.engine.step import is_out_of_memory
from tunewise.errors import DoesNotFit, TunewiseError
from tunewise.lab import worker
from tunewise.lab.executor import WRITE_FAILED
from tunewise.lab.outcome import Failed, OutOfMemory

PRELOADED = (worker,)
"""What is imported before the first job; its own imports are what takes time."""

_SET_PARENT_DEATH_SIGNAL = 1


def main() -> None:
    """Serve jobs until standard input ends."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
    _say({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        if "preload" in job:
            _preload(job["preload"])
            continue
        server = os.getpid()
        child = os.fork()
        if child == 0:
            run_job(job, server)
        _say({"started": child})
        _, status = os.waitpid(child, 0)
        _say({"ended": os.waitstatus_to_exitcode(status)})


def _preload(modules: list[str]) -> None:
    """Import modules once for all jobs; one that cannot be imported is the job's to complain about."""
    for module in modules:
        with suppress(Exception):
            importlib.import_module(module)


def run_job(job: dict[str, Any], server: int) -> None:
    """Do a job in this process, which ends with it, or with `server`, its parent."""
    os.setsid()  # so that the whole group of the trial can be killed
    die_with_parent(server)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _redirect(Path(job["folder"]) / "log.txt")
    _prefer_to_be_killed()
    if job["memory_bytes"] is not None:
        _limit_memory(int(job["memory_bytes"]))
    try:
        try:
            outcome = _outcome(job).model_dump_json()
        finally:  # what it wrote may have filled the disk, on which its outcome and its log shall still find room
            shutil.rmtree(Path(job["folder"]) / "work", ignore_errors=True)
    except BaseException:  # this is a fork: whatever it is, it must not get back into the server's loop
        _leave(1)
    try:
        write_whole(Path(job["folder"]) / "outcome.json", outcome)
    except OSError:
        _leave(WRITE_FAILED)
    _leave(0)


def _outcome(job: dict[str, Any]) -> Any:
    """Call the job's function; the errors that a trial can end with are outcomes."""
    module, _, name = job["function"].partition(":")
    try:
        return getattr(importlib.import_module(module), name)(**job["arguments"])
    except DoesNotFit as error:
        return OutOfMemory(reason=str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return OutOfMemory(reason=(str(error) or type(error).__name__).splitlines()[0])
    except TunewiseError as error:
        return Failed(reason=str(error))


def _leave(code: int) -> None:
    """End this process, with a traceback in its log where an exception is the reason."""
    with suppress(OSError):  # the disk of the log may be full
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # no clean-up of the server's: its pipes are not ours


def _redirect(log: Path) -> None:
    """Give the child a log of its own instead of the server's pipes."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(file)


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies (Linux); elsewhere nothing happens.

    Args:
        parent: the parent's process id where it is known from before the fork: a parent that dies before this call
            has been replaced already, and asking for its id would find the one that took over.
    """
    parent = os.getppid() if parent is None else parent
    library = ctypes.util.find_library("c")
    control = getattr(ctypes.CDLL(library), "prctl", None) if library else None
    if control is not None:
        control(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)


def _prefer_to_be_killed() -> None:
    """When the machine runs out of memory the kernel shall kill the trial, not the study."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError:
        return


def _limit_memory(num_bytes: int) -> None:
    """Let this process allocate `num_bytes` beyond what it has; then allocations fail, which is an outcome."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        present = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    except (OSError, StopIteration):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (present + num_bytes, hard))


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
