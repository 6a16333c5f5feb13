"""What a source claims, what we found, and how the two are compared: the rules are fixed before anything is measured.

A claim is one of two kinds:

* a value ("at"): ours has to lie within `tolerance` of the published one, with its whole interval;
* a direction ("above" or "below" what no effect would give): ours has to lie on that side, with its whole interval. A
  published number from other hardware or another scale is a check of direction only, so its `tolerance` is None.

| verdict | when |
|---|---|
| same | within the tolerance (and, of a direction, on the right side) |
| same direction | on the right side, and not within the tolerance, or none is declared |
| differs | outside the tolerance, or on the wrong side, or no effect where the published one would have been seen |
| not testable here | it was not measured, with a reason, or the interval holds both the claim and its contrary |
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field
from scipy import stats

from tunewise.recipe import Value

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Verdict(enum.StrEnum):
    """How our result stands to the published one."""

    SAME = "same"
    SAME_DIRECTION = "same direction"
    DIFFERS = "differs"
    NOT_TESTABLE = "not testable here"


class Mark(enum.StrEnum):
    """How we know what the source says."""

    READ = "read at the source"
    MEMORY = "from memory, unchecked"
    COMPUTED = "computed from the source's numbers"
    FORMULA = "follows from the method's formula"


class Claim(Value):
    """One thing that a source says, and which result of ours would agree with it.

    Attributes:
        key: a name for it, unique within its reproduction.
        says: what the source says, a sentence.
        mark: how we know.
        published: the source's number in `unit`; None where it gives only a direction.
        unit: "x" for a ratio, "nats", "%", "bits per weight", ...
        expects: "at" the published value, or "above" or "below" `neutral`.
        neutral: what no effect would give, 1 of a ratio and 0 of a difference; only of directions.
        tolerance: the largest distance from `published` that counts as the same, in `unit`; None: direction only.
    """

    key: str
    says: str
    mark: Mark
    published: float | None = None
    unit: str = "x"
    expects: Literal["at", "above", "below"] = "at"
    neutral: float | None = None
    tolerance: float | None = None

    def is_sound(self) -> bool:
        """Say whether the claim has what its kind needs."""
        if self.expects == "at":
            return self.published is not None and self.tolerance is not None and self.neutral is None
        return self.neutral is not None and (self.tolerance is None or self.published is not None)


class Finding(Value):
    """What we measured for a claim: a number with its 95 % interval, or the reason why there is none.

    Attributes:
        middle, low, high: in the claim's unit; an exact number has all three alike, one of unknown noise no ends.
        reason: why it was not measured, or a remark on how it was.
    """

    middle: Finite | None = None
    low: Finite | None = None
    high: Finite | None = None
    reason: str = ""

    @classmethod
    def exact(cls, value: float, reason: str = "") -> Self:
        """Return a finding that has no uncertainty: a count, an identity."""
        return cls(middle=value, low=value, high=value, reason=reason)

    @classmethod
    def of(cls, values: Sequence[float], reason: str = "") -> Self:
        """Return the mean of independent repetitions (seeds) with Student's 95 % interval.

        Of one repetition there is no interval: nobody knows its noise.
        """
        count, middle = len(values), math.fsum(values) / len(values)
        if count == 1:
            return cls(middle=middle, reason=reason)
        deviation = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (count - 1))
        half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
        return cls(middle=middle, low=middle - half, high=middle + half, reason=reason)

    @classmethod
    def untested(cls, reason: str) -> Self:
        """Return that this was not measured, and why."""
        return cls(reason=reason)


class Judged(Value):
    """A claim with what we found and the verdict."""

    claim: Claim
    finding: Finding
    verdict: Verdict
    reason: str

    @property
    def ratio(self) -> float | None:
        """Ours over the published number, where that says something."""
        ours, theirs = self.finding.middle, self.claim.published
        return ours / theirs if ours is not None and theirs else None


def judge(claim: Claim, finding: Finding) -> Judged:
    """Compare what was found with the claim, by the rules at the top of this file."""
    verdict, reason = _compare(claim, finding)
    return Judged(claim=claim, finding=finding, verdict=verdict, reason=reason)


def _compare(claim: Claim, finding: Finding) -> tuple[Verdict, str]:
    middle, low, high = finding.middle, finding.low, finding.high
    if middle is None:
        return Verdict.NOT_TESTABLE, finding.reason
    if low is None or high is None:
        return Verdict.NOT_TESTABLE, _joined("one repetition: its noise is not known", finding.reason)
    if claim.expects == "at":
        verdict = _at(claim, low, high)
        noise = "too noisy here: the interval is wider than the tolerance" if verdict == Verdict.NOT_TESTABLE else ""
        return verdict, _joined(noise, finding.reason)
    return _direction(claim, middle, low, high, finding.reason)


def _at(claim: Claim, low: float, high: float) -> Verdict:
    assert claim.published is not None
    assert claim.tolerance is not None
    bottom, top = claim.published - claim.tolerance, claim.published + claim.tolerance
    slack = 1e-12 * max(1.0, abs(claim.published))  # of binary fractions
    if low >= bottom - slack and high <= top + slack:
        return Verdict.SAME
    return Verdict.DIFFERS if high < bottom or low > top else Verdict.NOT_TESTABLE


def _direction(claim: Claim, middle: float, low: float, high: float, reason: str) -> tuple[Verdict, str]:
    assert claim.neutral is not None
    is_on_side = low > claim.neutral if claim.expects == "above" else high < claim.neutral
    if is_on_side:
        is_same = (
            claim.published is not None
            and claim.tolerance is not None
            and abs(middle - claim.published) <= claim.tolerance * (1 + 1e-12)
        )
        return (Verdict.SAME if is_same else Verdict.SAME_DIRECTION), reason
    is_undecided = low <= claim.neutral <= high and low < high
    leans = middle > claim.neutral if claim.expects == "above" else middle < claim.neutral
    would_be_seen = claim.published is not None and not low <= claim.published <= high
    if is_undecided and leans and not would_be_seen:
        noise = f"too noisy here: the interval holds {claim.neutral:g}, which is no effect"
        return Verdict.NOT_TESTABLE, _joined(noise, reason)
    return Verdict.DIFFERS, reason


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
