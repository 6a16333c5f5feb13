"""The rules of the verdicts: what counts as the same, a direction, a difference, or not tested."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from scipy import stats

from tunewise.reproduce import ALL
from tunewise.reproduce.claim import Claim, Finding, Mark, Verdict, judge


def value(published: float, tolerance: float) -> Claim:
    return Claim(key="k", says="it is", mark=Mark.READ, published=published, tolerance=tolerance)


def side(
    expects: Literal["above", "below"], *, published: float | None = None, tolerance: float | None = None
) -> Claim:
    return Claim(
        key="k", says="it is", mark=Mark.READ, published=published, tolerance=tolerance, expects=expects, neutral=1.0
    )


def between(low: float, middle: float, high: float) -> Finding:
    return Finding(middle=middle, low=low, high=high)


@pytest.mark.parametrize(
    ("claim", "finding", "verdict"),
    [
        (value(4.127, 0.001), Finding.exact(4.1275), Verdict.SAME),
        (value(4.127, 0.001), Finding.exact(4.129), Verdict.DIFFERS),
        (value(0.0, 0.02), between(-0.01, 0.0, 0.01), Verdict.SAME),
        (value(0.0, 0.02), between(-0.01, 0.01, 0.03), Verdict.NOT_TESTABLE),
        (value(0.0, 0.02), between(0.03, 0.04, 0.05), Verdict.DIFFERS),
        (value(0.3, 0.1), Finding.exact(0.1 + 0.1), Verdict.SAME),
        (side("above"), between(1.1, 1.2, 1.3), Verdict.SAME_DIRECTION),
        (side("above", published=1.2), between(1.1, 1.2, 1.3), Verdict.SAME_DIRECTION),
        (side("above", published=1.2, tolerance=0.1), between(1.1, 1.25, 1.4), Verdict.SAME),
        (side("above", published=2.0, tolerance=0.1), between(1.1, 1.2, 1.3), Verdict.SAME_DIRECTION),
        (side("above"), between(0.7, 0.8, 0.9), Verdict.DIFFERS),
        (side("above"), Finding.exact(1.0), Verdict.DIFFERS),
        (side("above"), between(0.9, 1.1, 1.3), Verdict.NOT_TESTABLE),
        (side("above"), between(0.7, 0.9, 1.1), Verdict.DIFFERS),
        (side("above", published=2.0), between(0.99, 1.01, 1.03), Verdict.DIFFERS),
        (side("below"), between(0.7, 0.8, 0.9), Verdict.SAME_DIRECTION),
        (side("below"), between(1.1, 1.2, 1.3), Verdict.DIFFERS),
        (side("above"), Finding(middle=3.0), Verdict.NOT_TESTABLE),
        (side("above"), Finding.untested("needs a GPU"), Verdict.NOT_TESTABLE),
    ],
)
def test_verdict(claim: Claim, finding: Finding, verdict: Verdict) -> None:
    assert judge(claim, finding).verdict == verdict


def test_what_was_not_measured_or_is_noisy_says_why() -> None:
    assert judge(side("above"), Finding.untested("needs a GPU")).reason == "needs a GPU"
    assert "no effect" in judge(side("above"), between(0.9, 1.1, 1.3)).reason
    assert "one repetition" in judge(side("above"), Finding.of([3.0])).reason


def test_seeds_get_student_s_interval() -> None:
    found = Finding.of([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert found.middle == pytest.approx(7 / 3)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_ratio_is_ours_over_theirs() -> None:
    assert judge(value(2.0, 1.0), Finding.exact(1.0)).ratio == 0.5
    assert judge(value(0.0, 1.0), Finding.exact(1.0)).ratio is None


def test_a_finding_is_a_number() -> None:
    with pytest.raises(ValueError, match="finite"):
        Finding.exact(math.nan)


def test_every_claim_of_every_reproduction_is_sound() -> None:
    assert len(ALL) >= 3
    for reproduction in ALL:
        keys = [claim.key for claim in reproduction.claims]
        assert len(keys) == len(set(keys)) > 0
        assert [claim.key for claim in reproduction.claims if not claim.is_sound()] == [], reproduction.name
