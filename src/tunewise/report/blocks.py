"""What a page consists of: sections of text, tables, charts, notes and code, as plain values.

The template turns them into HTML and escapes every text; so a section is built, and tested, without any markup.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from tunewise.lab.outcome import Interval
from tunewise.report.numbers import Number

Tone = Literal["", "chosen", "dim", "bad"]


@dataclass(frozen=True)
class Bar:
    """A bar behind a number: its length and its interval, as shares of the longest in the column."""

    share: float
    low: float
    high: float

    @property
    def style(self) -> str:
        """The bar as CSS variables, in per cent."""
        whisker = max(0.0, self.high - self.low)
        return f"--bar-length:{100 * self.share:.1f}%;--from:{100 * self.low:.1f}%;--whisker:{100 * whisker:.1f}%"

    @property
    def has_whisker(self) -> bool:
        """Whether the interval is wide enough to be drawn."""
        return self.high - self.low > 0.004


@dataclass(frozen=True)
class Cell:
    """One cell: a text, and under it what qualifies it (an interval, a remark)."""

    text: str
    under: str = ""
    bar: Bar | None = None
    tone: Tone = ""

    @staticmethod
    def of(number: Number, bar: Bar | None = None, tone: Tone = "") -> Cell:
        """Return a number as a cell."""
        return Cell(number.text, number.interval, bar, tone)


@dataclass(frozen=True)
class Column:
    """A column's heading, the unit under it, and whether its cells are numbers (set to the right).

    What `is_extra` follows from other columns and is left out on a phone.
    """

    title: str
    unit: str = ""
    is_number: bool = True
    is_extra: bool = False


@dataclass(frozen=True)
class Row:
    """Cells, the first of which is the row's heading."""

    cells: tuple[Cell, ...]
    is_chosen: bool = False


@dataclass(frozen=True)
class Table:
    """A table; `caption` says what it shows, `foot` what its numbers mean."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    foot: str = ""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Chart:
    """A figure for plotly.js.

    Attributes:
        id: unique in the page.
        title: over the chart; "" where the heading of the section says it.
        described: what a person who cannot see it should know.
        figure: {"data": [...], "layout": {...}}; colours are CSS variables, "var(--ink)".
        narrow: what replaces parts of the layout on a phone, by dotted path.
        caption: how to read it.
        numbers: numbers of the figure as a table, folded.
    """

    id: str
    title: str
    described: str
    figure: dict[str, Any]
    narrow: dict[str, Any] = field(default_factory=dict)
    caption: str = ""
    numbers: Table | None = None
    kind: str = field(default="chart", init=False)


@dataclass(frozen=True)
class Note:
    """Why something is not shown, or what has to be known with it."""

    text: str
    tone: Tone = ""
    kind: str = field(default="note", init=False)


@dataclass(frozen=True)
class Words:
    """Paragraphs, under a small heading where there is one."""

    paragraphs: tuple[str, ...]
    title: str = ""
    kind: str = field(default="words", init=False)


@dataclass(frozen=True)
class Code:
    """Text to be copied."""

    id: str
    title: str
    text: str
    kind: str = field(default="code", init=False)


@dataclass(frozen=True)
class Group:
    """Charts or words that stand side by side where there is room."""

    blocks: tuple[Chart | Words | Note, ...]
    kind: str = field(default="group", init=False)


Block = Table | Chart | Note | Words | Code | Group


@dataclass(frozen=True)
class Section:
    """One subject of the page; `short` is its name in the contents."""

    id: str
    title: str
    short: str
    blocks: tuple[Block, ...]


def bars(values: list[Interval | None]) -> list[Bar | None]:
    """Return bars whose longest, interval included, fills the column."""
    known = [value.high for value in values if value is not None and math.isfinite(value.high)]
    top = max(known, default=0.0)
    if top <= 0:
        return [None] * len(values)
    return [
        None
        if value is None
        else Bar(*(min(1.0, max(0.0, part / top)) for part in (value.middle, value.low, value.high)))
        for value in values
    ]


def exactly(value: float | None) -> Interval | None:
    """Return a value without uncertainty as an interval."""
    return None if value is None else Interval(middle=value, low=value, high=value)


def charts_of(sections: tuple[Section, ...]) -> list[Chart]:
    """Return all charts in the order of the page."""
    found: list[Chart] = []
    for section in sections:
        for block in section.blocks:
            inside = block.blocks if isinstance(block, Group) else (block,)
            found += [each for each in inside if isinstance(each, Chart)]
    return found
