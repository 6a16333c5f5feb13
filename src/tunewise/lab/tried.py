"""One combination of methods that was tried: speed, memory, forgetting, and whether its numbers are sound."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunewise.lab.factors import On
from tunewise.lab.gate import Verdict
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory
from tunewise.quality.measured import Measured


@dataclass(frozen=True)
class Tried:
    """One combination that was tried.

    Attributes:
        on: the factors that are on.
        role: what it was first tried for.
        outcomes: of each repetition.
        gate: how its first batch compares; None where there is nothing to compare with.
    """

    on: On
    role: str
    outcomes: tuple[Measurement | OutOfMemory | Failed, ...]
    gate: Verdict | None = None

    @property
    def measured(self) -> tuple[Measurement, ...]:
        """The measurements among the outcomes."""
        return tuple(outcome for outcome in self.outcomes if isinstance(outcome, Measurement))

    @property
    def seconds(self) -> float:
        """Seconds of a step, the median over repetitions; infinite where there is no measurement."""
        values = sorted(m.step_seconds.middle for m in self.measured if m.step_seconds is not None)
        return values[len(values) // 2] if values else math.inf

    @property
    def peak_bytes(self) -> float:
        """Peak of tensor memory; infinite where there is no measurement."""
        values = [m.peak_tensor_bytes for m in self.measured if m.peak_tensor_bytes is not None]
        return float(max(values)) if values else math.inf

    @property
    def forgetting(self) -> Measured | None:
        """What its steps made the model forget, nats per token; None where that was not measured."""
        return next((m.forgetting for m in self.measured if m.forgetting is not None), None)

    def forgets_more_than(self, budget: float | None) -> bool:
        """Whether its few steps alone have cost more than a whole training may."""
        return budget is not None and self.forgetting is not None and self.forgetting.middle > budget

    @property
    def is_sound(self) -> bool:
        """Whether it was measured and its numbers agree with the plain form's."""
        return bool(self.measured) and (self.gate is None or self.gate.passed)


def nats_lost(tried: Tried | None) -> float:
    """Return what a combination forgot, nats per token; 0 where nobody measured it."""
    return tried.forgetting.middle if tried is not None and tried.forgetting is not None else 0.0


def why_out(tried: Tried) -> str:
    """Say in one line why a combination is out."""
    if tried.gate is not None and not tried.gate.passed:
        return tried.gate.sentence
    return next((o.reason for o in tried.outcomes if not isinstance(o, Measurement)), "it gave no measurement")
