"""From the arms of a batch study to its answer: the cheapest batch whose loss cannot be told from the best one's.

Compared are arms of equal tokens, those of the longest round. The noise is the spread between seeds of the same batch,
pooled; differences of up to two standard errors of a difference are a tie (0.01 nats where no batch had two seeds).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats

from tunewise.lab.arms import ArmResult
from tunewise.lab.critical import LearningCurve
from tunewise.lab.findings import BatchPoint
from tunewise.lab.outcome import Interval
from tunewise.units import format_seconds

SMALLEST_BAND = 0.01
"""Nats; a tie where the noise between seeds is not known (methods.md, B5)."""

FINEST_BAND = 0.002
"""Nats; however small the noise is, smaller differences are not worth any time."""

ALMOST_AS_FAST = 0.05
"""Of tied batches whose whole training takes the same time up to this share, the smallest is taken."""


@dataclass(frozen=True)
class Verdict:
    """What the arms say.

    Attributes:
        curve: every batch at the longest budget that it was tried with, from the smallest.
        seed_noise: standard deviation between seeds in nats; None where no batch had two.
        tie_band: differences of so many nats are noise.
        critical_batch: from the curve through all arms; None where it does not tell.
        chosen: the answer; None when no arm gave a loss.
        undecided: batches that cannot be told from the best, `chosen` among them.
        sentences: in words.
    """

    curve: tuple[BatchPoint, ...]
    seed_noise: float | None
    tie_band: float
    critical_batch: Interval | None
    chosen: BatchPoint | None
    undecided: tuple[int, ...]
    sentences: tuple[str, ...]


def judge(
    results: Sequence[ArmResult],
    learning_curve: LearningCurve | None,
    run_tokens: int,
    run_seconds: Callable[[int], float],
) -> Verdict:
    """Return the verdict on arms that have been trained.

    Args:
        results: of all arms.
        learning_curve: through them, or None.
        run_tokens: of the whole training.
        run_seconds: of the whole training, by batch.
    """
    groups = _longest_at_best_rate(results)
    noise, freedom = _seed_noise(results)
    longest = max((tokens for _, tokens in groups.values()), default=0)
    finalists = {batch: group for batch, (group, tokens) in groups.items() if tokens == longest}
    band = _band(noise, min((len(group) for group in finalists.values()), default=1))
    means = {batch: statistics.mean(_losses(group)) for batch, group in finalists.items()}
    best = min(means.values(), default=math.inf)
    tied = {batch for batch, mean in means.items() if mean <= best + band}
    points = tuple(
        _point(batch, group, tokens, noise, freedom, run_seconds(batch), is_tied=batch in tied)
        for batch, (group, tokens) in sorted(groups.items())
    )
    among = [point for point in points if point.is_tied]
    chosen = None
    if among:
        fastest = min(point.run_seconds for point in among)
        chosen = next(point for point in among if point.run_seconds <= (1 + ALMOST_AS_FAST) * fastest)
    critical = learning_curve.critical_batch if learning_curve is not None else None
    return Verdict(
        curve=points,
        seed_noise=noise,
        tie_band=band,
        critical_batch=critical,
        chosen=chosen,
        undecided=tuple(point.batch_tokens for point in among),
        sentences=tuple(_sentences(points, chosen, band, noise, critical, longest / run_tokens)),
    )


def _longest_at_best_rate(results: Sequence[ArmResult]) -> dict[int, tuple[list[ArmResult], int]]:
    """Return for each batch the arms of its longest budget at the learning rate that did best there, and the budget."""
    groups: dict[int, tuple[list[ArmResult], int]] = {}
    measured = [result for result in results if result.loss is not None]
    for batch in {result.spec.batch_tokens for result in measured}:
        own = [result for result in measured if result.spec.batch_tokens == batch]
        tokens = max(result.spec.budget_tokens for result in own)
        at_length = [result for result in own if result.spec.budget_tokens == tokens]
        rate = min(at_length, key=lambda result: result.loss or math.inf).spec.learning_rate
        groups[batch] = ([result for result in at_length if result.spec.learning_rate == rate], tokens)
    return groups


def _losses(group: Sequence[ArmResult]) -> list[float]:
    return [result.loss for result in group if result.loss is not None]


def _seed_noise(results: Sequence[ArmResult]) -> tuple[float | None, int]:
    """Return the standard deviation between seeds, pooled over arms that differ in nothing else, and its freedom."""
    same: dict[tuple[int, float, int], list[float]] = {}
    for result in results:
        if result.loss is not None:
            spec = result.spec
            same.setdefault((spec.batch_tokens, spec.learning_rate, spec.budget_tokens), []).append(result.loss)
    several = [losses for losses in same.values() if len(losses) > 1]
    freedom = sum(len(losses) - 1 for losses in several)
    if not freedom:
        return None, 0
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
    return math.sqrt(squares / freedom), freedom


def _band(noise: float | None, num_seeds: int) -> float:
    """Two standard errors of the difference of two means of `num_seeds` seeds each."""
    return SMALLEST_BAND if noise is None else max(FINEST_BAND, 2 * noise * math.sqrt(2 / num_seeds))


def _point(
    batch: int,
    group: Sequence[ArmResult],
    tokens: int,
    noise: float | None,
    freedom: int,
    run_seconds: float,
    *,
    is_tied: bool,
) -> BatchPoint:
    losses = _losses(group)
    mean = statistics.mean(losses)
    half = 0.0 if noise is None else float(stats.t.ppf(0.975, freedom)) * noise / math.sqrt(len(losses))
    speeds = [result.arm.tokens_per_second for result in group if result.arm.tokens_per_second is not None]
    return BatchPoint(
        batch_tokens=batch,
        learning_rate=group[0].spec.learning_rate,
        budget_tokens=tokens,
        loss=Interval(middle=mean, low=mean - half, high=mean + half),
        num_seeds=len(losses),
        tokens_per_second=statistics.median(speeds) if speeds else 0.0,
        run_seconds=run_seconds,
        is_tied=is_tied,
    )


def _sentences(
    points: Sequence[BatchPoint],
    chosen: BatchPoint | None,
    band: float,
    noise: float | None,
    critical: Interval | None,
    share: float,
) -> list[str]:
    """Say what was found, what the budget could not tell, and what a larger or smaller batch would cost."""
    if chosen is None:
        return ["No arm gave a validation loss, so nothing can be said about the batch size."]
    said = [
        f"{chosen.batch_tokens:,} supervised tokens a step at learning rate {chosen.learning_rate:.2g}: validation "
        f"loss {chosen.loss.middle:.4f} after {share:.0%} of the run's tokens, the whole run in "
        f"{format_seconds(chosen.run_seconds)}."
    ]
    others = [f"{point.batch_tokens:,}" for point in points if point.is_tied and point is not chosen]
    if others:
        known = f"(noise between seeds {noise:.4f} nats)" if noise is not None else "(one seed each)"
        said.append(
            f"The budget could not tell {' or '.join(others)} from {chosen.batch_tokens:,}: they lie within {band:.3f} "
            f"nats {known}, and {chosen.batch_tokens:,} is the cheapest of them."
        )
    same_length = [point for point in points if point.budget_tokens == chosen.budget_tokens and not point.is_tied]
    for point in same_length:
        difference = point.loss.middle - chosen.loss.middle
        time = point.run_seconds / chosen.run_seconds - 1
        said.append(f"{point.batch_tokens:,} tokens a step would cost {difference:+.3f} nats and {time:+.0%} time.")
    if critical is not None:
        said.append(
            f"The critical batch is about {critical.middle:,.0f} tokens ({critical.low:,.0f} to {critical.high:,.0f}): "
            "a batch of that size needs twice the tokens of a tiny one."
        )
    if len(points) > 1 and chosen.batch_tokens in (points[0].batch_tokens, points[-1].batch_tokens):
        said.append("The answer lies at the edge of what was tried.")
    return said
