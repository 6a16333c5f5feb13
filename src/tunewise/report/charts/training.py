"""The final training as a figure: training and validation loss."""

from __future__ import annotations

from itertools import pairwise

from tunewise.lab.findings import TrainingResult
from tunewise.lab.outcome import Point
from tunewise.report.blocks import Chart
from tunewise.report.charts import style
from tunewise.report.charts.arms import thinned

BUCKETS = 300
"""So many points of the training loss are drawn; each is the mean of its neighbours."""


def final_training(training: TrainingResult) -> Chart | None:
    """Training loss (means of neighbouring steps) under validation loss; None without either curve."""
    if len(training.training_curve) < 2 and len(training.curve) < 2:
        return None
    data = []
    if len(training.training_curve) > 1:
        points = averaged(training.training_curve, BUCKETS)
        xy = [p.supervised_tokens for p in points], [p.loss for p in points]
        said = "training loss %{y:.4f} nats after %{x:,} tokens<extra></extra>"
        data.append(style.line(*xy, "var(--dim-mark)", 1.2, name="training", hoverinfo="all", hovertemplate=said))
    if training.curve:
        points = thinned(training.curve, BUCKETS)
        xy = [p.supervised_tokens for p in points], [p.loss for p in points]
        said = "validation loss %{y:.4f} nats after %{x:,} tokens<extra></extra>"
        mark = style.points(*xy, "var(--measured)", [], mode="lines+markers", name="validation", marker={"size": 6})
        mark |= {"hoverinfo": "all", "hovertemplate": said, "line": {"color": "var(--measured)", "width": 2.2}}
        data.append(mark)
        best = min(training.curve, key=lambda point: point.loss)
        big = {"size": 14, "line": {"color": "var(--card)", "width": 2}}
        words = [f"best: {best.loss:.4f} nats after {best.supervised_tokens:,} tokens"]
        where = [best.supervised_tokens], [best.loss]
        data.append(style.points(*where, "var(--chosen)", words, "diamond", name="best, and kept", marker=big))
    figure = style.layout(
        380,
        showlegend=True,
        xaxis=style.axis("supervised tokens learnt", tickformat="~s", rangemode="nonnegative"),
        yaxis=style.axis("loss, nats per supervised token"),
    )
    described = f"Loss of the final training over {training.steps} steps."
    if training.first_loss is not None and training.best_loss is not None:
        described += f" Validation loss falls from {training.first_loss:.3f} to {training.best_loss:.3f} nats."
    mean = max(1, len(training.training_curve) // BUCKETS)
    caption = f"Each point of the training loss is the mean of about {mean} steps." if mean > 1 else ""
    return Chart("training", "The final training", described, {"data": data, "layout": figure}, {}, caption)


def averaged(curve: tuple[Point, ...], most: int) -> list[Point]:
    """Return the means of at most so many stretches of neighbouring points."""
    if len(curve) <= most:
        return list(curve)
    bounds = [round(index * len(curve) / most) for index in range(most + 1)]
    return [
        Point(
            supervised_tokens=curve[stop - 1].supervised_tokens,
            loss=sum(point.loss for point in curve[start:stop]) / (stop - start),
        )
        for start, stop in pairwise(bounds)
    ]
