"""The training runs of the batch study as figures: rounds, learning rates, loss curves."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean

from tunewise.lab.findings import Arm, BatchFindings
from tunewise.lab.outcome import Point
from tunewise.report import numbers
from tunewise.report.blocks import Chart
from tunewise.report.charts import style

MOST_POINTS, FINALIST_POINTS = 24, 120
"""So many points of an arm's curve are drawn, and of a finalist's."""

ALL_POINTS = 8000
"""So many points are drawn of all dim arms together, and of all finalists: a page with hundreds stays under 6 MB."""


def best_by_batch(arms: tuple[Arm, ...], rung: int) -> dict[int, float]:
    """Return, for each batch of a round, its mean loss over seeds at the best of its learning rates."""
    losses: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for arm in arms:
        if arm.rung == rung and arm.loss is not None:
            losses[arm.batch_tokens][arm.learning_rate].append(arm.loss)
    return {batch: min(fmean(each) for each in rates.values()) for batch, rates in sorted(losses.items())}


def rounds(batch: BatchFindings) -> Chart | None:
    """Loss against batch in every round of the halving; None with only one round."""
    found = {rung: best_by_batch(batch.arms, rung) for rung in sorted({arm.rung for arm in batch.arms})}
    found = {rung: losses for rung, losses in found.items() if losses}
    if len(found) < 2:
        return None
    data = []
    for index, (rung, losses) in enumerate(found.items()):
        budget = max(arm.budget_tokens for arm in batch.arms if arm.rung == rung)
        colour = style.SERIES[min(6, 6 * index // (len(found) - 1))]
        hover = [f"{numbers.tokens(size)} tokens a step: {loss:.4f} nats" for size, loss in losses.items()]
        name = f"after {numbers.tokens(budget)} tokens"
        mark = style.points(list(losses), list(losses.values()), colour, hover, mode="lines+markers", name=name)
        data.append(mark | {"line": {"color": colour, "width": 2}, "marker": mark["marker"] | {"size": 7}})
    sizes = [arm.batch_tokens for arm in batch.arms]
    figure = style.layout(
        340,
        showlegend=True,
        xaxis=style.log2_axis(sizes, "batch, supervised tokens a step"),
        yaxis=style.axis("validation loss, nats"),
    )
    return Chart(
        "rounds",
        "The rounds of the study",
        f"Validation loss by batch size in {len(found)} rounds, each with more tokens and fewer batch sizes.",
        {"data": data, "layout": figure},
        {"xaxis.ticktext": [style.short_count(size) for size in sorted(set(sizes))]},
        "Every round trains the better arms on more tokens. Losses can be compared within a line, not between lines.",
    )


def learning_rates(batch: BatchFindings) -> Chart | None:
    """Loss against learning rate for each batch in the first round; None where only one rate was tried."""
    by_batch: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    first = min((arm.rung for arm in batch.arms), default=0)
    for arm in batch.arms:
        if arm.rung == first and arm.loss is not None:
            by_batch[arm.batch_tokens][arm.learning_rate].append(arm.loss)
    tuned = {size: rates for size, rates in sorted(by_batch.items()) if len(rates) > 1}
    if not tuned:
        return None
    data = []
    for index, (size, rates) in enumerate(tuned.items()):
        colour = style.SERIES[round(6 * index / max(1, len(tuned) - 1))]
        x = sorted(rates)
        y = [fmean(rates[each]) for each in x]
        hover = [f"{size:,} tokens, rate {numbers.learning_rate(a)}: {b:.4f} nats" for a, b in zip(x, y, strict=True)]
        sizes = [11 if value == min(y) else 6 for value in y]
        mark = style.points(x, y, colour, hover, mode="lines+markers", name=f"{size:,}", marker={"size": sizes})
        data.append(mark | {"line": {"color": colour, "width": 1.8}})
    figure = style.layout(
        340,
        showlegend=True,
        xaxis=_rate_axis([rate for rates in tuned.values() for rate in rates]),
        yaxis=style.axis("validation loss, nats"),
    )
    return Chart(
        "learning-rates",
        "The learning rate of each batch",
        f"Validation loss by learning rate for batches of {', '.join(f'{size:,}' for size in tuned)} tokens.",
        {"data": data, "layout": figure},
        {},
        "One line a batch (supervised tokens), first round; the large mark is the best rate. A best rate at the end of "
        "its line means that the true one may lie beyond.",
    )


def loss_curves(batch: BatchFindings) -> Chart | None:
    """Every arm's validation loss against the tokens it learnt from, finalists over dim others; None without curves."""
    drawn = [arm for arm in batch.arms if arm.curve]
    if not any(len(arm.curve) > 1 for arm in drawn):
        return None
    last = max(arm.rung for arm in drawn)
    finalists = [arm for arm in drawn if arm.rung == last]
    others = [arm for arm in drawn if arm.rung < last]
    sizes = sorted({arm.batch_tokens for arm in finalists})
    data = [_joined(others)] if others else []
    most = max(8, min(FINALIST_POINTS, ALL_POINTS // len(finalists)))
    seen: set[int] = set()
    for arm in sorted(finalists, key=lambda arm: arm.batch_tokens):
        index = sizes.index(arm.batch_tokens)
        colour = style.SERIES[round(6 * index / max(1, len(sizes) - 1))]
        points = thinned(arm.curve, most)
        is_chosen = arm.batch_tokens == batch.chosen_tokens
        said = f"{arm.batch_tokens:,} tokens a step, rate {numbers.learning_rate(arm.learning_rate)}, seed {arm.seed}"
        data.append(
            style.line(
                [p.supervised_tokens for p in points], [p.loss for p in points], colour,
                2.6 if is_chosen else 1.6, name=f"{arm.batch_tokens:,}" + (" (chosen)" if is_chosen else ""),
                legendgroup=str(arm.batch_tokens), showlegend=arm.batch_tokens not in seen, hoverinfo="all",
                hovertemplate=said + "<br>%{x:,} tokens: %{y:.4f} nats<extra></extra>",
            )
        )  # fmt: skip
        seen.add(arm.batch_tokens)
    figure = style.layout(
        400,
        showlegend=True,
        xaxis=style.axis("supervised tokens learnt", tickformat="~s"),
        yaxis=style.axis("validation loss, nats", range=_without_the_start(drawn)),
    )
    return Chart(
        "loss-curves",
        "Loss curves of all arms",
        f"Validation loss of {len(drawn)} training runs, {len(finalists)} of them in the last round.",
        {"data": data, "layout": figure},
        {},
        f"{len(finalists)} arms of the last round in colour, by supervised tokens a step; {len(others)} arms of "
        "earlier rounds in grey, a dot where only the end was evaluated. Each arm ends with its learning rate at zero.",
    )


def _rate_axis(rates: list[float]) -> style.Figure:
    low, high = min(rates) / 1.15, max(rates) * 1.15
    ticks = style.log_ticks(low, high, most=5)
    words = [numbers.learning_rate(tick) for tick in ticks]
    limits = [math.log10(low), math.log10(high)]
    return style.axis("learning rate", type="log", tickvals=ticks, ticktext=words, range=limits)


def thinned(curve: tuple[Point, ...], most: int) -> list[Point]:
    """Return at most so many points at equal distances, the first and the last among them."""
    if len(curve) <= most:
        return list(curve)
    return [curve[round(index * (len(curve) - 1) / (most - 1))] for index in range(most)]


def _joined(arms: list[Arm]) -> style.Figure:
    """One trace for all dim curves, with gaps between them: a page with hundreds of traces is slow."""
    x: list[float | None] = []
    y: list[float | None] = []
    most = max(4, min(MOST_POINTS, ALL_POINTS // len(arms)))
    for arm in arms:
        for point in thinned(arm.curve, most):
            x.append(point.supervised_tokens)
            y.append(point.loss)
        x.append(None)
        y.append(None)
    stroke, dot = {"color": "var(--dim)", "width": 1}, {"color": "var(--dim-mark)", "size": 3}
    base = {"type": "scatter", "mode": "lines+markers", "x": x, "y": y, "line": stroke, "connectgaps": False}
    return base | {"marker": dot} | {"name": "earlier rounds", "hoverinfo": "skip"}


def _without_the_start(arms: list[Arm]) -> list[float]:
    """Return a range in which the ends of the curves can be told apart: the steepest part is cut off above."""
    losses = [[p.loss for p in arm.curve if p.supervised_tokens > 0 and math.isfinite(p.loss)] for arm in arms]
    curves = [curve for curve in losses if curve]
    low = min((min(curve) for curve in curves), default=0.0)
    early = [curve[len(curve) // 12] for curve in curves]
    high = max([*early, *(curve[-1] for curve in curves), low + 0.01])
    return [low - 0.04 * (high - low), high + 0.08 * (high - low)]
