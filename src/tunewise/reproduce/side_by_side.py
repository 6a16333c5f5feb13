"""Several reproductions at once, each in a process of its own with its share of the cores.

Most experiments are small and use one thread, timed by the process's own clock, so two cores do two of them in the time
of one. A process keeps its result in the same folder as always; whoever waits for it finds it there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

import torch

MOST_JOBS = 4
"""Each holds a model, its gradients and a copy of torch: a few gigabytes."""

STOP_SECONDS = 10.0
"""After an interrupt, before the end: a shell's background jobs and what they start ignore interrupts."""

PROGRAM = "from tunewise.cli import main; main()"


def default_jobs() -> int:
    """Return how many experiments at once suit this machine: one a core, and one where they share an accelerator."""
    return 1 if torch.cuda.is_available() else min(MOST_JOBS, torch.get_num_threads())


@contextmanager
def side_by_side(
    names: Sequence[str],
    jobs: int,
    options: Sequence[str],
    say: Callable[[str], None],
    program: Sequence[str] = (sys.executable, "-c", PROGRAM),
) -> Iterator[Callable[[str], bool]]:
    """Start `tunewise reproduce NAME` for every name, `jobs` at a time; a stop of this call stops them.

    Args:
        names: in the order in which they begin.
        jobs: how many at once; each has that part of this process's threads.
        options: of the command line, the same for all.
        say: shows a line of a process's progress, with the name before it.
        program: what is called with "reproduce", options and name.

    Yields:
        a function that waits for a name and says whether its process ended well (one that was not started did).
    """
    threads = str(max(1, torch.get_num_threads() // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    running: set[subprocess.Popen[str]] = set()
    lock, is_stopped = Lock(), False

    def work(name: str) -> bool:
        with lock:
            if is_stopped:
                return False
            process = subprocess.Popen(
                [*program, "reproduce", "--jobs", "1", *options, name],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            running.add(process)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("    "):
                say(f"{name}: {line.strip()}")
        code = process.wait()
        with lock:
            running.discard(process)
        return code == 0

    with ThreadPoolExecutor(jobs) as pool:
        waiting = {name: pool.submit(work, name) for name in names}
        try:
            yield lambda name: name not in waiting or waiting[name].result()
        finally:
            with lock:
                is_stopped = True
                left = list(running)
            _stop(left)
            pool.shutdown(wait=True, cancel_futures=True)


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
