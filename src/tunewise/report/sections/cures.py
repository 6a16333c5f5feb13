"""What was done about a model that the gate had refused: every cure with its numbers, and how to try the others."""

from __future__ import annotations

from tunewise.lab.cure_findings import CureFindings, CurePoint, UntriedCure
from tunewise.quality.measured import Measured
from tunewise.report import numbers
from tunewise.report.blocks import Block, Cell, Column, Row, Table, Tone, Words
from tunewise.report.charts.cures import gain_against_forgetting
from tunewise.report.numbers import NOTHING, signed, significant

FOOT = (
    "Gain is how far the loss on held-out documents fell, forgetting how far that on general text rose, both against "
    "the base; intervals are 95 %, over documents. What nobody put to the whole gate was out by these two numbers."
)


def cure_blocks(found: CureFindings) -> tuple[Block, ...]:
    """Return words, figure and tables about the cures."""
    blocks: list[Block] = [Words(found.sentences, "Cures")]
    if found.points:
        table = cure_table(found)
        chart = gain_against_forgetting(found, table)
        blocks.append(table if chart is None else chart)
    if found.untried:
        blocks.append(untried_table(found.untried))
    return tuple(blocks)


def cure_table(found: CureFindings) -> Table:
    """Return one row a state, the uncured one first."""
    columns = (
        Column("State", is_number=False),
        Column("Gain", "nats, 95 %"),
        Column("Forgetting", "nats, 95 %"),
        Column("Gain kept", is_extra=True),
        Column("Took", is_extra=True),
        Column("Verdict", is_number=False),
    )
    rows = tuple(_row(point, point.name == found.chosen) for point in (found.uncured, *found.points))
    return Table("Every cure that was tried", columns, rows, FOOT)


def change_cell(measured: Measured | None) -> Cell:
    """Print a change of a loss with its interval."""
    if measured is None:
        return Cell(NOTHING)
    bounds = f"{significant(measured.low, measured.middle)} to {significant(measured.high, measured.middle)}"
    return Cell(signed(measured.middle, 3), bounds)


def kept_words(point: CurePoint) -> str:
    """Print the share of the gain that is kept."""
    return NOTHING if point.kept is None else f"{point.kept:.0%}"


def untried_table(untried: tuple[UntriedCure, ...]) -> Table:
    """Return why cures were not tried, and the command of each."""
    rows = tuple(
        Row((Cell(cure.label, cure.reason), Cell(numbers.seconds(cure.expected_seconds).text), Cell(cure.command)))
        for cure in untried
    )
    columns = (Column("Not tried", is_number=False), Column("Expected"), Column("Command", is_number=False))
    return Table("What else could be tried", columns, rows)


def _row(point: CurePoint, is_chosen: bool) -> Row:
    tone: Tone = "" if point.is_cure else "dim" if point.passed is None else "bad"
    cells = (
        Cell(point.label),
        change_cell(point.gain),
        change_cell(point.forgetting),
        Cell(kept_words(point)),
        Cell(numbers.seconds(point.seconds).text),
        Cell(point.verdict, tone=tone),
    )
    return Row(cells, is_chosen)
