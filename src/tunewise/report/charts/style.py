"""What all figures share: axes, error bars, marks, and texts that plotly cannot take for markup."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from tunewise.lab.outcome import Interval
from tunewise.report import numbers

CLEAR = "rgba(0,0,0,0)"
SERIES = tuple(f"var(--series-{index})" for index in range(1, 8))
"""Colours from small to large."""

Figure = dict[str, Any]

_STEPS: tuple[tuple[float, ...], ...] = (
    (1, 1.2, 1.4, 1.7, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 1.2, 1.5, 2, 3, 4, 6, 8),
    (1, 1.4, 2, 3, 5, 7),
    (1, 2, 5),
    (1,),
)


def safe(text: str) -> str:
    """Escape a text for plotly.js, which renders some tags and links in labels."""
    return html.escape(text, quote=False)


def axis(title: str = "", **more: Any) -> Figure:
    """Return an axis that cannot be dragged, so that a finger scrolls the page."""
    base: Figure = {
        "title": {"text": title, "standoff": 10, "font": {"size": 12.5}},
        "gridcolor": "var(--grid)",
        "zeroline": False,
        "linecolor": "var(--rule)",
        "ticks": "",
        "automargin": True,
        "fixedrange": True,
        "separatethousands": True,
    }
    return base | more


def log2_axis(values: Iterable[float], title: str, **more: Any) -> Figure:
    """Return a logarithmic axis with a tick at every value; half an octave is left at both ends."""
    ticks = sorted(set(values))
    return axis(
        title,
        **{
            "type": "log",
            "tickvals": ticks,
            "ticktext": [f"{tick:,.0f}" for tick in ticks],
            "range": [math.log10(ticks[0] / 1.42), math.log10(ticks[-1] * 1.42)],
            "showgrid": True,
            **more,
        },
    )


def ratio_axis(intervals: Sequence[Interval], **more: Any) -> Figure:
    """Return a logarithmic axis of ratios around one, with ticks that people read: ×0.5, ×0.8, ×1."""
    low = min([0.85, *(each.low for each in intervals if each.low > 0)]) / 1.08
    high = max([1.18, *(each.high for each in intervals if math.isfinite(each.high))]) * 1.08
    scale = {"type": "log", "tickangle": 0, **_ratio_ticks(log_ticks(low, high, most=6))}
    return axis("", **scale, range=[math.log10(low), math.log10(high)], **more)


def narrow_ratio_axis(full: Figure) -> Figure:
    """Return what a phone changes of such an axis: fewer ticks."""
    low, high = (10**bound for bound in full["range"])
    return {f"xaxis.{key}": value for key, value in _ratio_ticks(log_ticks(low, high, most=4)).items()}


def _ratio_ticks(ticks: Sequence[float]) -> Figure:
    return {"tickvals": list(ticks), "ticktext": [f"×{tick:g}" for tick in ticks]}


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Return round numbers for a logarithmic axis, as many as fit and one at least."""
    ticks: list[float] = []
    for steps in _STEPS:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        made = [float(f"{step * 10.0**decade:.3g}") for decade in decades for step in steps]
        fitting = [tick for tick in made if low <= tick <= high]
        ticks = fitting or ticks
        if len(fitting) <= most:
            break
    return ticks or [low]


def named_axis(names: Sequence[str], **more: Any) -> Figure:
    """Return a vertical axis with a name at 0, 1, 2 ... from the top."""
    labels = short_names(names)
    ticks = {"tickvals": list(range(len(names))), "ticktext": labels, "range": [len(names) - 0.45, -0.55]}
    return axis("", **ticks, showgrid=False, tickfont={"color": "var(--ink)", "size": 12.5}, **more)


def short_names(names: Sequence[str], most: int = 34) -> list[str]:
    """Return names as labels of an axis."""
    return [safe(shortened(name, most)) for name in names]


def layout(height: int, **more: Any) -> Figure:
    """Return a layout without frame, background or colours of its own; `height` in pixels."""
    base: Figure = {
        "height": height,
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": "var(--sans)", "size": 12.5, "color": "var(--soft)"},
        "margin": {"l": 58, "r": 14, "t": 12, "b": 40},
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": "var(--ink)"}},
        "hoverlabel": {
            "bgcolor": "var(--card)",
            "bordercolor": "var(--dim-mark)",
            "font": {"color": "var(--ink)", "family": "var(--sans)", "size": 12.5},
            "align": "left",
        },
        "hovermode": "closest",
        "dragmode": False,
    }
    return base | more


def points(
    x: Sequence[float], y: Sequence[float], colour: str, hover: Sequence[str], symbol: str = "circle", **more: Any
) -> Figure:
    """Return markers, with what is said about each on hovering."""
    marker = {"color": colour, "size": 9, "opacity": 1, "symbol": symbol, "line": {"color": "var(--card)", "width": 1}}
    marker |= more.pop("marker", {})
    base: Figure = {"type": "scatter", "mode": "markers", "x": list(x), "y": list(y), "marker": marker}
    said = {"hovertext": list(hover), "hoverinfo": "text"} if hover else {"hoverinfo": "skip"}
    return base | said | {"cliponaxis": False} | more


def line(x: Sequence[float], y: Sequence[float], colour: str, width: float = 2, **more: Any) -> Figure:
    """Return a line that says nothing on hovering."""
    stroke = {"color": colour, "width": width} | more.pop("line", {})
    base: Figure = {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "line": stroke, "hoverinfo": "skip"}
    return base | more


def errors(values: Sequence[Interval], colour: str) -> Figure:
    """Return the error bars of intervals."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [each.high - each.middle for each in values],
        "arrayminus": [each.middle - each.low for each in values],
        "color": colour,
        "thickness": 1.5,
        "width": 0,
    }


def rectangle(x0: float, x1: float, y0: float, y1: float, colour: str, **more: Any) -> Figure:
    """Return a shaded area under the marks."""
    corners = {"x0": x0, "x1": x1, "y0": y0, "y1": y1}
    return {"type": "rect", **corners, "fillcolor": colour, "line": {"width": 0}, "layer": "below"} | more


def rule(x0: float, x1: float, y0: float, y1: float, **more: Any) -> Figure:
    """Return a thin reference line."""
    corners = {"x0": x0, "x1": x1, "y0": y0, "y1": y1}
    return {"type": "line", **corners, "line": {"color": "var(--dim-mark)", "width": 1.2, "dash": "dot"}} | more


def label(text: str, x: float, y: float, colour: str = "var(--soft)", **more: Any) -> Figure:
    """Return a text in the figure; on a logarithmic axis a position is a decimal logarithm, as plotly wants it."""
    font = {"color": colour, "size": 12}
    return {"text": text, "x": x, "y": y, "showarrow": False, "font": font} | more


def shortened(text: str, most: int = 34) -> str:
    """Cut a long name in the middle, where it matters least."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[-(most - 1 - head) :]}"


def byte_scale(sizes: Iterable[float]) -> tuple[str, float]:
    """Return the unit in which sizes are drawn, and its bytes."""
    return numbers.byte_unit(max(sizes, default=0.0))


def second_scale(durations: Iterable[float]) -> tuple[str, float]:
    """Return the unit in which durations are drawn, and its seconds."""
    return numbers.second_unit(max(durations, default=0.0))


def short_count(count: float) -> str:
    """Print a power of two as phones have room for: 4K for 4,096."""
    return f"{count / 1024:g}K" if count >= 1024 and count % 512 == 0 else f"{count:,.0f}"
