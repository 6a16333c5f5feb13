"""Runs trials one at a time, each in a process of its own, and turns whatever becomes of it into an outcome.

    with Executor() as executor:
        outcome = executor.run("tunewise.lab.worker:run_trial", {...}, folder, timeout=60)

One at a time, because two trials on one device would measure each other.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tunewise.errors import StorageError, TunewiseError
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory, outcome_from_json

START_SECONDS = 120.0
"""Importing torch and transformers takes a few seconds; on a slow disk, the first time, much longer."""

WRITE_FAILED = 74
"""The exit code of a child that could not write its outcome (EX_IOERR of sysexits.h)."""


class ServerDied(TunewiseError):
    """The process that starts trials is gone."""


class Executor:
    """Starts the fork server with the first trial and keeps it; `close` ends it and a trial that is running."""

    def __init__(self, memory_bytes: int | None = None, preload: Sequence[str] = ()) -> None:
        """Make an executor.

        Args:
            memory_bytes: what a trial may allocate in the host's memory; None for no limit.
            preload: modules that every trial needs, imported once by the server.
        """
        self.memory_bytes, self.preload = memory_bytes, tuple(preload)
        self._server: subprocess.Popen[bytes] | None = None
        self._child: int | None = None
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the server if it is not there; the first trial does so too."""
        if self._server is not None and self._server.poll() is None:
            return
        self._unread = b""
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; we end the server
        )
        self._answer("ready", START_SECONDS)
        self._send({"preload": self.preload})

    def run(
        self, function: str, arguments: dict[str, Any], folder: Path, timeout: float
    ) -> Measurement | OutOfMemory | Failed:
        """Call `function` in a fresh process and return what became of it.

        Args:
            function: "package.module:name"; returns an outcome.
            arguments: plain data.
            folder: the trial's own; gets log.txt and outcome.json. `folder`/work is removed afterwards.
            timeout: seconds after which the trial is killed.

        Raises:
            KeyboardInterrupt: the user stopped it; the trial is killed, its folder removed.
            StorageError: the trial's folder cannot be made, or its outcome cannot be written there.
        """
        started = time.perf_counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "outcome.json").unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"The trial's folder {folder} cannot be made: {error}.") from error
        try:
            self.start()
            code = self._run(function, arguments, folder, timeout)
            outcome = _read_outcome(folder, code, timeout)
        except ServerDied as error:
            outcome = Failed(reason=str(error), log=str(folder / "log.txt"))
        except BaseException:  # an interrupt as well: nothing of a trial may be left behind, then it goes on
            self.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self._child = None
            shutil.rmtree(folder / "work", ignore_errors=True)
        return outcome.model_copy(update={"trial_seconds": time.perf_counter() - started})

    def close(self) -> None:
        """Kill the running trial and end the server."""
        self._kill_child()
        server, self._server = self._server, None
        if server is not None:
            server.kill()
            server.wait()
            for stream in (server.stdin, server.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()

    def _run(self, function: str, arguments: dict[str, Any], folder: Path, timeout: float) -> int | None:
        """Return the child's exit code, negative for a signal; None when it was killed for taking too long."""
        self._send(
            {
                "function": function,
                "arguments": arguments,
                "folder": str(folder.resolve()),
                "memory_bytes": self.memory_bytes,
            }
        )
        self._child = self._answer("started", START_SECONDS)
        try:
            return self._answer("ended", timeout)
        except TimeoutError:
            self._kill_child()
            self._answer("ended", START_SECONDS)
            return None

    def _send(self, message: dict[str, Any]) -> None:
        assert self._server is not None
        assert self._server.stdin is not None
        try:
            self._server.stdin.write(json.dumps(message).encode() + b"\n")
            self._server.stdin.flush()
        except BrokenPipeError:
            raise ServerDied("The process that starts trials died.") from None

    def _answer(self, wanted: str, timeout: float) -> int:
        """Wait for the server's next line and return what it says.

        Raises:
            TimeoutError: nothing came.
            ServerDied: the pipe ended.
        """
        assert self._server is not None
        assert self._server.stdout is not None
        descriptor, deadline = self._server.stdout.fileno(), time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = max(0.0, deadline - time.monotonic())  # an answer may be there although we were paused for longer
            if not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
            received = os.read(descriptor, 65536)
            if not received:
                code = self._server.wait()
                self._server = None
                raise ServerDied(f"The process that starts trials died with exit code {code}.")
            self._unread += received
        line, self._unread = self._unread.split(b"\n", 1)
        return int(json.loads(line)[wanted])

    def _kill_child(self) -> None:
        if self._child is not None:
            for kill in (os.killpg, os.kill):  # it may not have a group of its own yet
                with suppress(ProcessLookupError, PermissionError):
                    kill(self._child, signal.SIGKILL)


_SERVER = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from tunewise.lab.server import main; main()"
"""The server sees the modules that its parent sees."""


def _read_outcome(folder: Path, code: int | None, timeout: float) -> Measurement | OutOfMemory | Failed:
    log = folder / "log.txt"
    if code is None:
        return Failed(reason=f"took longer than {timeout:.0f} s and was stopped", log=str(log))
    if code == 0:
        return finished_outcome(folder) or Failed(reason="its outcome cannot be read", log=str(log))
    if code == -signal.SIGKILL:
        return OutOfMemory(reason="killed by the system, as a rule because memory ran out", log=str(log))
    if code < 0:
        return Failed(reason=f"the interpreter crashed: {signal.Signals(-code).name}", log=str(log))
    if code == WRITE_FAILED:
        raise StorageError(
            f"A trial has ended, but its outcome cannot be written to {folder}: {_last_line(log) or 'no room'}. "
            "All earlier ones are kept; make room and start the same command again."
        )
    return Failed(reason=_last_line(log) or f"ended with exit code {code}", log=str(log))


def finished_outcome(folder: Path) -> Measurement | OutOfMemory | Failed | None:
    """Return the outcome that a trial has written into its folder, or None: it appears there whole or not at all."""
    try:
        outcome = outcome_from_json((folder / "outcome.json").read_bytes())
    except (OSError, ValueError):
        return None
    return outcome if isinstance(outcome, Measurement) else outcome.model_copy(update={"log": str(folder / "log.txt")})


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].strip()[:500] if lines else ""
