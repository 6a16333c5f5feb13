"""A published ladder of methods as rows that can be run: what was published, and the recipe that rebuilds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One row of the published table.

    Attributes:
        speed: in the table's own unit, more is faster.
        memory: in the table's own unit, with what the table says belongs to no tensor taken off.
    """

    speed: float
    memory: float


@dataclass(frozen=True)
class Row:
    """One row: how it was published, and how it is rebuilt.

    Attributes:
        name: as in the table.
        published: None for a row of ours that the table does not have.
        recipe: `methods` and `batch` of the recipe; None where we have no counterpart, and `note` says why.
        over: the row that this one is compared with: what it adds is then `effect`.
        effect: what is added; rows with an effect and `is_single` are the single effects of the product.
        is_single: whether it is added to the start alone, or to a row that differs from it in nothing that matters.
        note: what differs from the table's setting.
        steps: that are timed in each repetition.
    """

    name: str
    published: Published | None
    recipe: dict[str, Any] | None
    over: str | None = None
    effect: str | None = None
    is_single: bool = False
    note: str = ""
    steps: int = 3


@dataclass(frozen=True)
class Whole:
    """A row that has several effects together, to be held against their product."""

    row: str
    effects: tuple[str, ...]


@dataclass(frozen=True)
class Ladder:
    """A published table.

    Attributes:
        start: the row that everything is compared with in the end.
        wholes: the first one is the ladder's cumulative effect.
        units: of the published speed and memory.
        document_lengths: of the documents in the order in which steps take them, over and over.
        source: where the table is.
        setting: what was measured there, in words.
    """

    name: str
    source: str
    setting: str
    units: tuple[str, str]
    start: str
    rows: tuple[Row, ...]
    wholes: tuple[Whole, ...]
    config: dict[str, Any]
    document_lengths: tuple[int, ...]
    training: dict[str, Any]
    differences: tuple[str, ...]

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def rebuilt(self) -> tuple[Row, ...]:
        """The rows that can be run."""
        return tuple(row for row in self.rows if row.recipe is not None)
