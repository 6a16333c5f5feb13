"""Traces side by side, in processes: each keeps one core busy for half a second, and none needs another's answer.

The processes are forked, so they start in milliseconds with everything imported; they live as long as a plan is made.
They are forked first of all, before this process measures the machine: threads of OpenMP, of autograd and of CUDA do
not survive a fork.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType

import torch

from tunewise.engine.dry_run import TraceJob
from tunewise.engine.estimate import Trace

MOST_PROCESSES = 4
"""The traces that are asked for together are two depths times two sizes of micro-batch."""


class Processes:
    """Runs traces in forked processes, or one after another where there is one core or a fork is not safe.

    Use as a context; `trace_all` is what `engine.dry_run.dry_run` and `footprint.footprint` take.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        """Fork.

        What the imports have made, some 700,000 objects that all stay, is taken out of the garbage collector's rounds
        meanwhile, here and in the processes: looking through it again and again was a sixth of a trace's time.
        """
        gc.freeze()
        count = min(_num_cores(), MOST_PROCESSES)
        if count > 1 and _can_fork():
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(count, context, initializer=_begin)
            self._pool.submit(os.getpid)  # the first piece of work makes all processes
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the processes."""
        gc.unfreeze()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def trace_all(self, jobs: Sequence[TraceJob]) -> list[Trace]:
        """Return the answers in the order of `jobs`; an error of one of them is raised here."""
        if self._pool is None or len(jobs) == 1:
            return [job.run() for job in jobs]
        return list(self._pool.map(TraceJob.run, jobs))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _can_fork() -> bool:
    """Say whether processes can be forked and have not to fear what CUDA has started in this one."""
    return "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()


def _begin() -> None:
    """Leave Ctrl-C to the process that asked, and start no threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
