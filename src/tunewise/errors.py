"""Every error that tunewise raises on purpose, drawn as one tree.

    TunewiseError                 exit code
    ├── InputError                2   a file, row, field or argument is wrong; says which, and what to do
    ├── Conflict                  2   two wishes cannot both be honoured; says about what they disagree
    ├── MissingBackend            2   an optional library is not installed; prints the install line
    ├── DoesNotFit                2   the memory does not suffice; says what would fit
    ├── CheckpointError           2   a checkpoint is damaged, incomplete or belongs to another recipe
    ├── StorageError              2   the disk is full or read-only; says what was kept
    ├── TrainingDiverged          3   the loss left the finite numbers or jumped; says where the batch was written
    ├── VerificationError         4   what was saved does not compute what was trained
    └── GateFailed                5   the model is trained and kept, and the quality gate refuses it

A message says what is wrong, where (file, line, field) and what to do about it. `Interrupted` is no error: the user or
the system asked us to stop, and we leave with the signal's own exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TunewiseError(Exception):
    """The root: anything that tunewise raises on purpose. `exit_code` is what the command line returns."""

    exit_code: int = 2


class InputError(TunewiseError):
    """The user's file, row, field or argument is wrong."""


class Conflict(TunewiseError):
    """Two wishes of one recipe cannot both be honoured."""


class MissingBackend(TunewiseError):
    """An optional library is needed and not installed."""

    def __init__(self, library: str, needed_for: str, extra: str) -> None:
        super().__init__(
            f"{needed_for} needs the library '{library}', which is not installed.\n"
            f"  Install it with: pip install 'tunewise[{extra}]'"
        )


class DoesNotFit(TunewiseError):
    """The work does not fit into the memory that there is."""


class CheckpointError(TunewiseError):
    """A checkpoint is damaged, incomplete, or belongs to another recipe or data set."""


class StorageError(TunewiseError):
    """The disk is full, read-only or gone."""


class TrainingDiverged(TunewiseError):
    """The loss or a gradient is not finite any more, or the loss jumped."""

    exit_code = 3


class VerificationError(TunewiseError):
    """A saved model, reloaded, does not compute what the trained one computes."""

    exit_code = 4


class GateFailed(TunewiseError):
    """The quality gate refuses a model that was trained and saved."""

    exit_code = 5


class Interrupted(Exception):
    """The user (SIGINT) or the system (SIGTERM) asked for a stop; everything is saved. Exit code 128 + signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the tail of an error message that names the nearest known word, or lists all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(names)}."
