"""Which cures are tried, until when, and which one becomes the result.

    afterwards    factors of the change, averages: nothing is trained, so they are tried whatever is left
    training      one cure after the other, cheapest first, each only when what is left pays for it

It ends when a model passes that has kept nearly all of the gain: what is left cannot be spent better. A model that
passes because it hardly learnt anything is no cure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewise.curing.cures import GATE_COST, Cure
from tunewise.lab.cure_findings import CureFindings, CurePoint, UntriedCure
from tunewise.lab.outcome import Failed, JudgedState, Measurement, OutOfMemory
from tunewise.units import format_seconds

LEAST_KEPT = 0.5
"""A model that has kept less of the gain is no cure."""

ENOUGH = 0.9
"""With this share of the gain kept, no further cure is worth a training."""

AFTERWARDS_COST = 0.5
"""Of a training, what the cures that train nothing are expected to take: some ten evaluations."""

Attempt = Callable[[Cure, float], Measurement | OutOfMemory | Failed]
"""Tries a cure that is expected to take so many seconds."""


@dataclass(frozen=True)
class Question:
    """What a search is about.

    Attributes:
        uncured: the model that the gate refused.
        unmendable: failed checks that no cure mends; with any of these nothing is tried.
        cures: what can be tried, cheapest first.
        training_seconds: of the uncured model.
        max_forgetting: the recipe's budget, nats per token.
        folder: in which what cures saved lies.
        command: makes a cure again.
    """

    uncured: CurePoint
    unmendable: tuple[str, ...]
    cures: tuple[Cure, ...]
    training_seconds: float
    max_forgetting: float
    folder: Path
    command: Callable[[Cure], str]

    def expected_seconds(self, cure: Cure) -> float:
        """Return what a cure is expected to take, judging included."""
        return self.training_seconds * (GATE_COST * cure.cost if cure.recipe is not None else AFTERWARDS_COST)


def search(question: Question, attempt: Attempt, left: Callable[[], float]) -> CureFindings:
    """Try cures until one is good enough or nothing more can be paid for.

    Args:
        question: what it is about.
        attempt: tries one.
        left: seconds that may still be spent.
    """
    points: list[CurePoint] = []
    untried: list[UntriedCure] = []
    if question.unmendable:
        return _findings(question, points, untried)
    for cure in question.cures:
        seconds = question.expected_seconds(cure)
        best = best_of(points)
        if best is not None and (best.kept is None or best.kept >= ENOUGH):
            untried.append(_untried(question, cure, "a cheaper one passes and keeps the gain", is_needless=True))
        elif cure.recipe is not None and seconds > left():
            reason = f"needs about {format_seconds(seconds)}, and {format_seconds(max(0.0, left()))} are left"
            untried.append(_untried(question, cure, reason))
        else:
            points += points_of(question, cure, attempt(cure, seconds))
    return _findings(question, points, untried)


def best_of(points: Sequence[CurePoint]) -> CurePoint | None:
    """Return the cure that gained most, the cheaper one of equals; None where none is a cure."""
    cures = [point for point in points if point.is_cure]
    return max(cures, key=lambda point: point.gain.middle if point.gain is not None else 0.0, default=None)


def points_of(question: Question, cure: Cure, outcome: Measurement | OutOfMemory | Failed) -> list[CurePoint]:
    """Return what came of a cure: one point, or several where nothing was trained."""
    kind = question.uncured.model_copy(
        update={"kind": "training" if cure.recipe is not None else "afterwards", "command": question.command(cure)}
    )
    if not isinstance(outcome, Measurement) or not outcome.states:
        said = "gave nothing to judge" if isinstance(outcome, Measurement) else outcome.reason
        gone = {"gain": None, "forgetting": None, "kept": None, "passed": None, "folder": ""}
        named = {"name": cure.name, "label": cure.label, "verdict": said, "seconds": outcome.trial_seconds}
        return [kind.model_copy(update=gone | named)]
    seconds = outcome.trial_seconds / len(outcome.states)
    return [_point(question, cure, state, kind).model_copy(update={"seconds": seconds}) for state in outcome.states]


def _point(question: Question, cure: Cure, state: JudgedState, like: CurePoint) -> CurePoint:
    before, gain = question.uncured.gain, state.gain
    kept = None
    if before is not None and gain is not None and before.is_above_zero:
        kept = gain.middle / before.middle
    passed = None if state.quality is None else state.quality.passed
    is_cure = bool(passed) and bool(state.folder) and (kept is None or kept >= LEAST_KEPT)
    point = CurePoint(
        name=state.name,
        label=cure.label if cure.recipe is not None else _label(state.name),
        kind=like.kind,
        gain=gain,
        forgetting=state.forgetting,
        kept=kept,
        passed=passed,
        is_cure=is_cure,
        verdict="",
        folder=str(question.folder / state.folder) if state.folder else "",
        command=like.command if cure.recipe is not None else f"{like.command} {_option(state.name)}",
    )
    return point.model_copy(update={"verdict": _verdict(question, point, state)})


def _verdict(question: Question, point: CurePoint, state: JudgedState) -> str:
    if point.is_cure:
        return "passes"
    if point.passed and point.kept is not None and point.kept < LEAST_KEPT:
        return "passes, but loses the gain"
    if state.quality is not None:
        return f"refused: {', '.join(check.name for check in state.quality.checks if check.status == 'failed')}"
    if point.forgetting is not None and point.forgetting.middle > question.max_forgetting:
        return "over the budget of forgetting"
    if point.gain is not None and not point.gain.is_above_zero:
        return "gains nothing"
    if point.name.startswith("scale"):
        return "not the largest factor within the budget"
    return "over the budget of a domain of general text"


def _label(name: str) -> str:
    """Return "scale-0.5" and "average-3" in words."""
    what, _, number = name.partition("-")
    return f"{number} of the change" if what == "scale" else f"average of {number} checkpoints"


def _option(name: str) -> str:
    what, _, number = name.partition("-")
    return f"--scale {number}" if what == "scale" else f"--average-last {number}"


def _untried(question: Question, cure: Cure, reason: str, *, is_needless: bool = False) -> UntriedCure:
    return UntriedCure(
        name=cure.name,
        label=cure.label,
        reason=reason,
        is_needless=is_needless,
        expected_seconds=question.expected_seconds(cure),
        command=question.command(cure),
    )


def _findings(question: Question, points: list[CurePoint], untried: list[UntriedCure]) -> CureFindings:
    best = best_of(points)
    return CureFindings(
        uncured=question.uncured,
        points=tuple(points),
        untried=tuple(untried),
        chosen="" if best is None else best.name,
        max_forgetting=question.max_forgetting,
        sentences=tuple(_sentences(question, points, untried, best)),
    )


def _sentences(
    question: Question, points: list[CurePoint], untried: list[UntriedCure], best: CurePoint | None
) -> list[str]:
    said = [f"The gate refused what was trained ({question.uncured.verdict.removeprefix('refused: ')})."]
    if question.unmendable:
        faults = " and ".join(question.unmendable)
        return [*said, f"No cure was tried: {faults} is a fault of the data or of the set-up, which no cure mends."]
    if best is None:
        said.append(f"None of the {len(points)} states that were tried is a cure, so the refused model is the result.")
    else:
        said.append(f"Cured by {best.label}: {_trade(best)}. The uncured model is kept, and marked.")
    if wanting := [cure.label for cure in untried if not cure.is_needless]:
        said.append(f"Not tried, because the budget does not pay for them: {'; '.join(wanting)}.")
    return said


def _trade(point: CurePoint) -> str:
    parts = []
    if point.kept is not None:
        parts.append(f"{point.kept:.0%} of the gain kept")
    if point.forgetting is not None:
        parts.append(f"forgetting {point.forgetting.middle:.3f} nats a token")
    return ", ".join(parts) or "it passes the gate"
