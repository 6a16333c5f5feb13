"""Made-up cures: an uncured model, a sweep of the factor, an average, and trainings."""

from __future__ import annotations

from tunewise.lab.cure_findings import CureFindings, CureKind, CurePoint, UntriedCure
from tunewise.quality.measured import Measured
from tunewise.quality.verdict import Check, QualityReport, Status


def measured(middle: float, half: float = 0.01) -> Measured:
    return Measured(middle=middle, low=middle - half, high=middle + half, noise_floor=half, num=40)


def report(*, passed: bool) -> QualityReport:
    status: Status = "passed" if passed else "failed"
    return QualityReport(passed=passed, checks=(Check(name="forgetting", status=status, sentence="so much harder"),))


def point(name: str, label: str, kind: CureKind, gain: float | None, lost: float | None, verdict: str) -> CurePoint:
    return CurePoint(
        name=name, label=label, kind=kind, gain=None if gain is None else measured(gain),
        forgetting=None if lost is None else measured(lost), kept=gain, passed=verdict == "passes",
        is_cure=verdict == "passes", verdict=verdict, seconds=12.0, folder=f"runs/tuned/cures/{name}",
        command=f"tunewise train runs/tuned/cures/{name}.yaml",
    )  # fmt: skip


def uncured(gain: float = 1.0) -> CurePoint:
    return point("uncured", "uncured", "uncured", gain, 0.3, "refused: forgetting")


def cures() -> CureFindings:
    points = (
        point("scale-0.75", "0.75 of the change", "afterwards", 0.85, 0.15, "over the budget of forgetting"),
        point("scale-0.5", "0.5 of the change", "afterwards", 0.6, 0.04, "passes"),
        point("early-stop", "early stopping by the forgetting budget", "training", 0.4, 0.05, "refused: forgetting"),
        point("rank-4", "LoRA of rank 4", "training", None, None, "the interpreter crashed: SIGSEGV"),
        point("replay-1", "replay of 1% general text", "training", 0.95, 0.03, "passes"),
    )
    untried = UntriedCure(
        name="kl", label="KL to the base, weight 0.1", reason="needs about 3 min, and 20 s are left",
        expected_seconds=185.0, command="tunewise train runs/tuned/cures/kl.yaml",
    )  # fmt: skip
    return CureFindings(
        uncured=uncured(), points=points, untried=(untried,), chosen="replay-1", max_forgetting=0.05,
        sentences=("The gate refused what was trained: forgetting.", "Cured by replay of 1% general text."),
    )  # fmt: skip
