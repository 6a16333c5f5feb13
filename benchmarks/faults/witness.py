"""What an outsider sees of a tuning that was killed: its storage, the outcomes on the disk, processes left behind.

Nothing here changes the tuning's folder. The storage is read from a copy, so that a journal which a kill left beside it
is rolled back there and still has to be rolled back by the next life.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import RDBStorage

MARK = "TUNEWISE_FAULT_STUDY"
"""An environment variable that the tuning's process hands on to all that it starts."""

GONE_WITHIN = 5.0
"""Seconds in which the kernel has to end a killed process's children."""

Stamp = tuple[int, int]
"""Inode and time of change of a file: another one means that it was written again."""


@dataclass(frozen=True)
class Seen:
    """A tuning's folder at one moment.

    Attributes:
        kept: how often each trial's key stands in the storage.
        finished: trials whose whole outcome lies in their folder, which is written before the storage is.
        has_journal: whether SQLite was in a transaction.
        running: trials that were begun and have no outcome.
        partial: half-written files.
        is_training: whether the final training had begun.
    """

    kept: Counter[str]
    finished: dict[str, Stamp]
    has_journal: bool
    running: tuple[str, ...]
    partial: tuple[str, ...]
    is_training: bool

    @property
    def phase(self) -> str:
        """What the tuning was doing."""
        if self.has_journal:
            return "writing the storage"
        if self.is_training:
            return "final training"
        if self.running:
            return "trial running"
        return "between trials" if self.kept else "starting"


def look(folder: Path) -> Seen:
    """Look at the folder of a tuning whose process is dead."""
    kept = kept_trials(folder)
    begun = sorted(path.parent.name for path in folder.glob("trials/*/log.txt"))
    finished = finished_trials(folder)
    return Seen(
        kept=kept,
        finished=finished,
        has_journal=(folder / "study.db-journal").exists(),
        running=tuple(key for key in begun if key not in finished and key not in kept),
        partial=tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob(".*partial*"))),
        is_training=(folder / "training").exists(),
    )


def kept_trials(folder: Path) -> Counter[str]:
    """Count the keys of the trials with an outcome in the storage."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        for file in folder.glob("study.db*"):
            shutil.copy2(file, name)
        copy = Path(name) / "study.db"
        if not copy.exists() or copy.stat().st_size == 0:
            return found
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            storage = RDBStorage(f"sqlite:///{copy}")
        except Exception as error:  # Optuna's and SQLAlchemy's: each of them is the failure that is looked for
            raise AssertionError(f"the storage cannot be read after a kill: {error}") from error
        for study in storage.get_all_studies():
            for trial in storage.get_all_trials(study._study_id, deepcopy=False):
                if "outcome" in trial.user_attrs:
                    found[trial.user_attrs["key"]] += 1
        storage.engine.dispose()
    return found


def finished_trials(folder: Path) -> dict[str, Stamp]:
    """Return the trials whose outcome lies complete in their folder."""
    found = {}
    for file in sorted(folder.glob("trials/*/outcome.json")):
        with suppress(ValueError):
            json.loads(file.read_bytes())
            status = file.stat()
            found[file.parent.name] = (status.st_ino, status.st_mtime_ns)
    return found


def orphans(mark: str) -> list[int]:
    """Wait until no process with this mark is alive; return those that stay, after killing them one by one."""
    deadline = time.monotonic() + GONE_WITHIN
    while (alive := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in alive:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return alive


def marked(mark: str) -> list[int]:
    """Return the processes that were started with this mark in their environment; the dead have none."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return sorted(found)
