"""Gain against forgetting: the uncured model, every cure that was tried, each with its intervals, and the front."""

from __future__ import annotations

from collections.abc import Sequence

from tunewise.lab.cure_findings import CureFindings, CurePoint
from tunewise.lab.outcome import Interval
from tunewise.quality.measured import Measured
from tunewise.report.blocks import Chart, Table
from tunewise.report.charts import style
from tunewise.report.numbers import signed

KINDS = (
    ("uncured", "uncured", "x", "var(--dim)"),
    ("afterwards", "without training again", "circle", "var(--measured)"),
    ("training", "trained again", "square", "var(--predicted)"),
)
"""Where a point comes from: name, in words, symbol, colour."""


def is_placed(point: CurePoint) -> bool:
    """Tell whether both numbers of a point are known."""
    return point.gain is not None and point.forgetting is not None


def front(points: Sequence[CurePoint]) -> list[CurePoint]:
    """Return the points that no other beats in gain and in forgetting, from the least forgetting to the most gain."""
    placed = [
        (p.gain.middle, p.forgetting.middle, p) for p in points if p.gain is not None and p.forgetting is not None
    ]

    def is_beaten(gain: float, lost: float) -> bool:
        return any(g >= gain and f <= lost and (g, f) != (gain, lost) for g, f, _ in placed)

    kept = [(lost, gain, point) for gain, lost, point in placed if not is_beaten(gain, lost)]
    return [point for _, _, point in sorted(kept, key=lambda each: each[:2])]


def gain_against_forgetting(found: CureFindings, table: Table) -> Chart | None:
    """Draw the front; None where no point has both numbers."""
    points = [point for point in (found.uncured, *found.points) if is_placed(point)]
    if not points:
        return None
    data = [_front_line(front(points))]
    for kind, words, symbol, colour in KINDS:
        mine = [point for point in points if point.kind == kind]
        if mine:
            data.append(_marks(mine, colour, symbol, words))
    chosen = [point for point in points if point.name == found.chosen]
    data += [_ring(point) for point in chosen]
    gains = [bound for p in points if p.gain for bound in (p.gain.low, p.gain.high, 0.0)]
    low, high = min(gains), max(gains)
    figure = style.layout(
        420,
        showlegend=True,
        xaxis=style.axis("forgetting, nats a token", zeroline=True, zerolinecolor="var(--rule)"),
        yaxis=style.axis("gain, nats a supervised token", zeroline=True, zerolinecolor="var(--rule)"),
        shapes=[style.rule(found.max_forgetting, found.max_forgetting, low, high)],
        annotations=[style.label("budget", found.max_forgetting, high, xanchor="left", yanchor="bottom", xshift=3)],
    )
    said = "; ".join(f"{p.label}, gain {_middle(p.gain)}, forgetting {_middle(p.forgetting)}" for p in front(points))
    return Chart(
        "cures",
        "What was gained against what was forgotten",
        f"{len(points)} states of the model by forgetting and gain, nats a token. On the front are: {said}.",
        {"data": data, "layout": figure},
        {"legend.font.size": 11},
        "Up is more learnt, left is less forgotten; bars are 95 % intervals. The dotted line through the points is the "
        "front: nothing else gains as much and forgets as little. Right of the upright line the budget of forgetting "
        "is spent. The ring is the result.",
        table,
    )  # fmt: skip


def _front_line(points: Sequence[CurePoint]) -> style.Figure:
    x = [point.forgetting.middle for point in points if point.forgetting]
    y = [point.gain.middle for point in points if point.gain]
    return style.line(x, y, "var(--dim-mark)", 1.4, line={"shape": "hv", "dash": "dot"}, showlegend=False)


def _marks(points: list[CurePoint], colour: str, symbol: str, words: str) -> style.Figure:
    lost = [_interval(point.forgetting) for point in points if point.forgetting]
    gains = [_interval(point.gain) for point in points if point.gain]
    hover = [
        f"<b>{style.safe(point.label)}</b><br>gain {_middle(point.gain)}<br>forgetting {_middle(point.forgetting)}<br>"
        f"{style.safe(point.verdict)}"
        for point in points
    ]
    x, y = [each.middle for each in lost], [each.middle for each in gains]
    bars = {"error_x": style.errors(lost, colour), "error_y": style.errors(gains, colour)}
    return style.points(x, y, colour, hover, symbol, name=words, marker={"size": 10}, **bars)


def _ring(point: CurePoint) -> style.Figure:
    ring = {"size": 20, "line": {"color": "var(--chosen)", "width": 2.5}}
    x, y = _interval(point.forgetting).middle, _interval(point.gain).middle
    return style.points([x], [y], "var(--chosen)", [], "circle-open", name="the result", marker=ring)


def _interval(measured: Measured | None) -> Interval:
    assert measured is not None, "only placed points are drawn"
    return Interval(middle=measured.middle, low=measured.low, high=measured.high)


def _middle(measured: Measured | None) -> str:
    return "" if measured is None else signed(measured.middle, 3)
