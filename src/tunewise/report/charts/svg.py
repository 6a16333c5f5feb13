"""A figure as an SVG file of its own, for documents: marks with error bars, lines, and a legend that may say much.

The page's figures are drawn by plotly.js in the reader's browser; a Markdown document has none. Colours follow the
reader's light or dark scheme. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from tunewise.report.charts.style import shortened

LEFT, TOP, WIDTH, HEIGHT, BOTTOM = 58.0, 44.0, 380.0, 300.0, 46.0
LEGEND, LINE_HEIGHT = 470.0, 15.0
MOST_LETTERS = 74
"""Of one line of the legend."""

COLOURS = ("#2563a8", "#c2571a", "#2f7d4f", "#8a4fa3")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.soft{fill:#666}.bold{font-weight:600}.grid{stroke:#e3e3e3}"
    ".axis{stroke:#999}.ground{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.soft{fill:#aaa}.grid{stroke:#333}.axis{stroke:#777}"
    ".ground{fill:#161616}}"
)


@dataclass(frozen=True)
class Mark:
    """A point with the half widths of its error bars, and a short text beside it."""

    x: float
    y: float
    text: str = ""
    x_error: float = 0.0
    y_error: float = 0.0


@dataclass(frozen=True)
class Series:
    """Marks of one colour, joined by a line where `is_line`; error bars are drawn where they are above zero."""

    name: str
    marks: tuple[Mark, ...]
    is_line: bool = False


@dataclass(frozen=True)
class Entry:
    """One entry of the legend: what it is about, and lines under it; `colour` of a series, -1 for none."""

    head: str
    lines: tuple[str, ...] = ()
    colour: int = -1


@dataclass(frozen=True)
class Plot:
    """A figure: what the axes are, what is drawn, and what is said beside it."""

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    legend: tuple[Entry, ...] = field(default=())


def draw(plot: Plot) -> str:
    """Return the figure as SVG.

    Raises:
        ValueError: there is nothing to draw, or a number is not finite.
    """
    marks = [mark for series in plot.series for mark in series.marks]
    if not marks or not all(math.isfinite(value) for mark in marks for value in (mark.x, mark.y)):
        raise ValueError("a plot needs marks, and finite numbers")
    x_axis = _Axis.over([v for m in marks for v in (m.x - m.x_error, m.x + m.x_error)], LEFT, LEFT + WIDTH)
    y_axis = _Axis.over([v for m in marks for v in (m.y - m.y_error, m.y + m.y_error)], TOP + HEIGHT, TOP)
    parts = [*_frame(plot, x_axis, y_axis)]
    for number, series in enumerate(plot.series):
        parts += _series(series, COLOURS[number % len(COLOURS)], x_axis, y_axis)
    legend, bottom = _legend(plot.legend)
    height = max(TOP + HEIGHT + BOTTOM, bottom)
    width = LEGEND + 7.0 * MOST_LETTERS if plot.legend else LEFT + WIDTH + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(plot.title)}"><title>{escape(plot.title)}</title><style>{_STYLE}</style>'
        f'<rect class="ground" width="100%" height="100%"/>{"".join(parts)}{"".join(legend)}</svg>\n'
    )


@dataclass(frozen=True)
class _Axis:
    """A linear axis from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def over(values: Sequence[float], start: float, end: float) -> _Axis:
        """Return an axis that holds the values and zero, with a little room."""
        low, high = min(0.0, *values), max(0.0, *values)
        room = 0.06 * (high - low or 1.0)
        return _Axis(low - (room if low < 0 else 0.0), high + room, start, end)

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return four to nine round numbers."""
        raw = (self.high - self.low) / 6
        power = 10 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
        return [number * step for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _frame(plot: Plot, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    parts = [_text(plot.title, LEFT, 22, "bold")]
    for tick in x_axis.ticks():
        x = x_axis.at(tick)
        parts.append(_line(x, TOP, x, bottom, 'class="grid"'))
        parts.append(_text(f"{tick:g}", x, bottom + 16, "soft", "middle"))
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts.append(_line(LEFT, y, right, y, 'class="grid"'))
        parts.append(_text(f"{tick:g}", LEFT - 7, y + 4, "soft", "end"))
    parts += [_line(LEFT, y_axis.at(0.0), right, y_axis.at(0.0), 'class="axis"')]
    parts += [_line(x_axis.at(0.0), TOP, x_axis.at(0.0), bottom, 'class="axis"')]
    parts.append(_text(plot.x_title, (LEFT + right) / 2, bottom + 36, "soft", "middle"))
    return [*parts, _text(plot.y_title, LEFT, TOP - 8, "soft")]


def _series(series: Series, colour: str, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    places = [(x_axis.at(mark.x), y_axis.at(mark.y)) for mark in series.marks]
    stroke = f'stroke="{colour}" stroke-width="1.6"'
    if series.is_line and len(places) > 1:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline fill="none" {stroke} points="{points}"/>')
    for mark, (x, y) in zip(series.marks, places, strict=True):
        if mark.x_error > 0:
            parts.append(_line(x_axis.at(mark.x - mark.x_error), y, x_axis.at(mark.x + mark.x_error), y, stroke))
        if mark.y_error > 0:
            parts.append(_line(x, y_axis.at(mark.y - mark.y_error), x, y_axis.at(mark.y + mark.y_error), stroke))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if series.is_line else 4.5}" fill="{colour}"/>')
        if mark.text:
            parts.append(_text(mark.text, x + 7, y - 6, "bold"))
    return parts


def _legend(entries: Sequence[Entry]) -> tuple[list[str], float]:
    """Return the legend, and where it ends."""
    parts, y = [], TOP
    for entry in entries:
        if entry.colour >= 0:
            parts.append(f'<circle cx="{LEGEND - 10}" cy="{y - 4}" r="4.5" fill="{COLOURS[entry.colour]}"/>')
        parts.append(_text(shortened(entry.head, MOST_LETTERS), LEGEND, y, "bold"))
        for line in entry.lines:
            y += LINE_HEIGHT
            parts.append(_text(shortened(line, MOST_LETTERS), LEGEND, y, "soft"))
        y += 1.4 * LINE_HEIGHT
    return parts, y


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {stroke}/>'


def _text(text: str, x: float, y: float, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
