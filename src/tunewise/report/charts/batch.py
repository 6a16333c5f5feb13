"""The answer of the batch study as a figure: loss, noise scale and cost over one axis of batch sizes."""

from __future__ import annotations

import math
from typing import Any

from tunewise.lab.findings import BatchFindings, BatchPoint
from tunewise.report import numbers
from tunewise.report.blocks import Chart, Table
from tunewise.report.charts import style

RANGES = {"two batches": "noise scale, two batches", "per example": "noise scale, per example"}
CRITICAL = "critical batch"
SHORT = {RANGES["two batches"]: "two batches", RANGES["per example"]: "per example", CRITICAL: "critical"}


def compared(batch: BatchFindings) -> list[BatchPoint]:
    """Return the points that learnt from as many tokens as the longest: only these can be compared."""
    budget = max(point.budget_tokens for point in batch.curve)
    return sorted((p for p in batch.curve if p.budget_tokens == budget), key=lambda point: point.batch_tokens)


def batch_curve(batch: BatchFindings, table: Table | None) -> Chart:
    """Loss, ranges and run time over one axis of batch sizes."""
    ranges = _ranges(batch)
    bottom = 0.44 if ranges else 0.36
    x_axis = style.log2_axis(
        [point.batch_tokens for point in batch.curve], "batch, supervised tokens a step", anchor="y3"
    )
    middle: dict[str, Any] = style.named_axis([name for name, *_ in ranges], domain=[0.285, 0.385], anchor="x")
    middle |= {"tickfont": {"size": 11, "color": "var(--soft)"}, "visible": bool(ranges)}
    unit, scale = style.second_scale(point.run_seconds for point in batch.curve)
    limits = _loss_range(batch)
    band = _noise_band(batch, x_axis["range"])
    places = ".2f" if limits[1] - limits[0] > 0.04 else ".3f"
    figure = style.layout(
        560,
        xaxis=x_axis,
        yaxis=style.axis("validation loss, nats", domain=[bottom, 1.0], range=limits, anchor="x", tickformat=places),
        yaxis2=middle,
        yaxis3=style.axis(f"whole run, {unit}", domain=[0.0, 0.235], rangemode="tozero", anchor="x", nticks=4),
        shapes=[*band, *_tie_band(batch)],
        annotations=[*_batch_labels(batch), *_beyond(ranges, x_axis["range"])],
    )
    data = [
        *_loss_marks(batch),
        *_dropped_marks(batch),
        *_range_marks(ranges, x_axis["range"]),
        *_run_marks(batch, unit, scale),
    ]
    return Chart(
        "batch-curve",
        "Loss and cost of each batch size",
        _described(batch),
        {"data": data, "layout": figure},
        {
            "yaxis2.ticktext": [SHORT[name] for name, *_ in ranges],
            "xaxis.tickfont": {"size": 11},
            "xaxis.ticktext": [style.short_count(point) for point in sorted({p.batch_tokens for p in batch.curve})],
            "margin.l": 48,
        }
        | ({"annotations.0.text": f"noise: {batch.tie_band:.3f} nats"} if batch.tie_band > 0 else {}),
        _caption(batch, bool(band)),
        table,
    )  # fmt: skip


def _loss_marks(batch: BatchFindings) -> list[style.Figure]:
    found = compared(batch)
    hover = [
        f"<b>{numbers.tokens(p.batch_tokens)} tokens a step</b><br>loss {numbers.nats(p.loss, 4)} nats<br>"
        f"learning rate {numbers.learning_rate(p.learning_rate)}, {p.num_seeds} seed{'s' if p.num_seeds > 1 else ''}"
        for p in found
    ]
    x, y = [p.batch_tokens for p in found], [p.loss.middle for p in found]
    marks = [
        style.line(x, y, "var(--measured)"),
        style.points(x, y, "var(--measured)", hover, error_y=style.errors([p.loss for p in found], "var(--measured)")),
    ]
    chosen = [(p, text) for p, text in zip(found, hover, strict=True) if p.batch_tokens == batch.chosen_tokens]
    for point, text in chosen:
        big = {"size": 15, "line": {"color": "var(--card)", "width": 2}}
        marks.append(
            style.points([point.batch_tokens], [point.loss.middle], "var(--chosen)", [text], "diamond", marker=big)
        )
    return marks


def _run_marks(batch: BatchFindings, unit: str, scale: float) -> list[style.Figure]:
    found = sorted(batch.curve, key=lambda point: point.batch_tokens)
    x, y = [p.batch_tokens for p in found], [p.run_seconds / scale for p in found]
    hover = [
        f"<b>{numbers.tokens(p.batch_tokens)} tokens a step</b><br>whole run {numbers.seconds(p.run_seconds)}<br>"
        f"{numbers.rate(p.tokens_per_second)}"
        for p in found
    ]
    colours = ["var(--chosen)" if p.batch_tokens == batch.chosen_tokens else "var(--dim-mark)" for p in found]
    symbols = ["diamond" if p.batch_tokens == batch.chosen_tokens else "circle" for p in found]
    marks = style.points(x, y, "", hover, yaxis="y3", marker={"color": colours, "symbol": symbols})
    return [style.line(x, y, "var(--dim-mark)", 1.5, yaxis="y3"), marks]


def _ranges(batch: BatchFindings) -> list[tuple[str, float | None, float, float]]:
    """Return (name, middle, low, high) of what bounds a sensible batch."""
    found: list[tuple[str, float | None, float, float]] = [
        (RANGES[each.estimator], each.tokens, each.low, math.inf if each.high is None else each.high)
        for each in batch.noise
    ]
    if batch.critical_batch is not None:
        whole = batch.critical_batch
        found.append((CRITICAL, whole.middle, whole.low, whole.high))
    return found


def _range_marks(ranges: list[tuple[str, float | None, float, float]], limits: list[float]) -> list[style.Figure]:
    left, right = (10**bound for bound in limits)
    marks = []
    for row, (name, middle, low, high) in enumerate(ranges):
        colour = "var(--chosen)" if name == CRITICAL else "var(--predicted)"
        start, end = (min(max(bound, left), right) for bound in (low, high))
        if start >= end:
            continue
        marks.append(style.line([start, end], [row, row], colour, 3, yaxis="y2"))
        if middle is not None and left <= middle <= right:
            text = f"{name}: {numbers.tokens(middle)} tokens ({numbers.tokens(low)} to {numbers.grouped(high)})"
            marks.append(style.points([middle], [row], colour, [text], yaxis="y2"))
    return marks


def _beyond(ranges: list[tuple[str, float | None, float, float]], limits: list[float]) -> list[style.Figure]:
    """Numbers at the edge for what lies beyond it."""
    left, right = (10**bound for bound in limits)
    labels = []
    for row, (_, _, low, high) in enumerate(ranges):
        text = f"{numbers.tokens(low)} to {numbers.grouped(high)}"
        where = {"xref": "x domain", "yref": "y2"}
        if low >= right:
            labels.append(style.label(f"{text} →", 0.995, row, xanchor="right", **where))
        elif high <= left:
            labels.append(style.label(f"← {text}", 0.005, row, xanchor="left", **where))
    return labels


def _tie_band(batch: BatchFindings) -> list[style.Figure]:
    best = min(point.loss.middle for point in compared(batch))
    if batch.tie_band <= 0:
        return []
    return [style.rectangle(0, 1, best, best + batch.tie_band, "var(--band)", xref="x domain", yref="y")]


def _noise_band(batch: BatchFindings, limits: list[float]) -> list[style.Figure]:
    bounded = [each for each in batch.noise if each.high is not None and each.low > 0]
    if not bounded:
        return []
    best = min(bounded, key=lambda each: (each.high or math.inf) / each.low)
    left, right = (10**bound for bound in limits)
    low, high = max(best.low, left), min(best.high or right, right)
    if low >= high:
        return []
    return [style.rectangle(low, high, 0, 1, "var(--noise-band)", xref="x", yref="y domain")]


def _dropped_marks(batch: BatchFindings) -> list[style.Figure]:
    """A cross at the lower edge for every batch that was dropped in an earlier round."""
    budget = compared(batch)[0].budget_tokens
    gone = [point for point in batch.curve if point.budget_tokens < budget]
    if not gone:
        return []
    hover = [
        f"<b>{numbers.tokens(p.batch_tokens)} tokens a step</b><br>dropped after "
        f"{numbers.tokens(p.budget_tokens)} tokens, at {numbers.nats(p.loss, 4)} nats"
        for p in gone
    ]
    low, high = _loss_range(batch)
    y = [low + 0.05 * (high - low)] * len(gone)
    marker = {"size": 8, "line": {"width": 0}}
    return [style.points([p.batch_tokens for p in gone], y, "var(--dim-mark)", hover, "x", marker=marker)]


def _batch_labels(batch: BatchFindings) -> list[style.Figure]:
    found = compared(batch)
    best = min(point.loss.middle for point in found)
    labels = []
    if batch.tie_band > 0:
        text = f"within noise of the best: {batch.tie_band:.3f} nats"
        where = {"xref": "x domain", "yref": "y", "xanchor": "right", "yanchor": "bottom"}
        labels.append(style.label(text, 0.995, best + batch.tie_band, **where))
    for index, point in enumerate(found):
        if point.batch_tokens == batch.chosen_tokens:
            beside = [each.loss.middle for each in found[max(0, index - 1) : index + 2]]
            is_valley = point.loss.middle <= sum(beside) / len(beside)
            y = point.loss.low if is_valley else point.loss.high
            anchor, shift = ("top", -6) if is_valley else ("bottom", 6)
            text = f"<b>chosen: {numbers.tokens(point.batch_tokens)}</b>"
            x, where = math.log10(point.batch_tokens), {"xref": "x", "yref": "y", "yanchor": anchor}
            labels.append(style.label(text, x, y, "var(--chosen)", yshift=shift, **where))
    return labels


def _loss_range(batch: BatchFindings) -> list[float]:
    found = compared(batch)
    best = min(point.loss.middle for point in found)
    low = min(point.loss.low for point in found)
    high = max([best + batch.tie_band, *(point.loss.high for point in found)])
    room = (high - low) or 0.01
    return [low - 0.22 * room, high + 0.14 * room]


def _caption(batch: BatchFindings, has_band: bool) -> str:
    found = compared(batch)
    seeds = sorted({point.num_seeds for point in found})
    said = (
        f"Each point is the validation loss after {numbers.tokens(found[0].budget_tokens)} supervised tokens at the "
        f"best learning rate found for that batch, the mean of {' or '.join(map(str, seeds))} "
        f"seed{'' if seeds == [1] else 's'}; bars are 95 % intervals."
    )
    shorter = [numbers.tokens(p.batch_tokens) for p in batch.curve if p.budget_tokens < found[0].budget_tokens]
    if shorter:
        said += f" A cross marks what was dropped in an earlier round: {', '.join(shorter)}."
    return said + (
        " The vertical band is the noise scale of the estimator that knows it better; smaller batches waste time, "
        "larger ones waste data."
        if has_band
        else ""
    )


def _described(batch: BatchFindings) -> str:
    parts = [f"{numbers.tokens(p.batch_tokens)}: {numbers.nats(p.loss, 3)}" for p in compared(batch)]
    return (
        f"Validation loss in nats by batch size in supervised tokens: {'; '.join(parts)}. Chosen: "
        f"{numbers.tokens(batch.chosen_tokens)}. Below, the time of the whole run at each batch size."
    )
