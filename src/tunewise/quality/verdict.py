"""What the gate says: one check a subject, with its number, its threshold and a sentence; and the report of all."""

from __future__ import annotations

from typing import Literal

from tunewise.quality.measured import Forgetting, Measured, Overfitting
from tunewise.recipe import Value

Status = Literal["passed", "failed", "not measured"]

REPORT_FILE = "quality.json"
FAILED_FILE = "QUALITY-FAILED.txt"


class Check(Value):
    """One demand of the gate.

    Attributes:
        name: of the subject ("task gain").
        status: "not measured" where there was nothing to measure with; the sentence says why.
        measured: the number with its interval; None for what is no number.
        threshold: what the number is held against, in words.
        sentence: what was found.
    """

    name: str
    status: Status
    measured: Measured | None = None
    threshold: str = ""
    sentence: str


class QualityReport(Value):
    """Everything that was measured about a run, and the verdict.

    Attributes:
        passed: whether no check failed.
        checks: in the order in which they are read.
        forgetting, overfitting: in detail, where they could be measured.
        fraction: how much was measured of what was planned (`quality/pace.py`); 0: the smallest sample.
        seconds: what measuring took, before and after training.
        training_seconds: what training took; None for a result that was measured later.
    """

    passed: bool
    checks: tuple[Check, ...]
    forgetting: Forgetting | None = None
    overfitting: Overfitting | None = None
    fraction: float = 1.0
    seconds: float = 0.0
    training_seconds: float | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of the checks that failed."""
        return tuple(f"{check.name}: {check.sentence}" for check in self.checks if check.status == "failed")
