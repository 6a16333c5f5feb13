"""A row of a table of published measurements: its cells, its peak in one unit, and of which memory that is the peak."""

from __future__ import annotations

import re
from dataclasses import dataclass

from published_stacks import stack_of

from tunewise.planner.choose import SAFETY_MARGIN

UNITS = {"bytes": 1e-9, "mb": 1e-3, "mib": 2**20 / 1e9, "gb": 1.0, "gib": 2**30 / 1e9}
"""Units of printed peaks, in decimal GB."""


class Unusable(Exception):
    """Why a row cannot be reproduced."""


@dataclass
class Row:
    """A published row with its prediction, or why there is none."""

    cells: dict[str, str]
    predicted_gb: float | None = None
    published_gb: float | None = None
    metric: str = ""
    reason: str | None = None

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        assert self.predicted_gb is not None
        assert self.published_gb is not None
        return (self.predicted_gb - self.published_gb) / self.published_gb

    @property
    def is_beyond_margin(self) -> bool:
        """Whether a planner that trusts the prediction would run out of memory in spite of its safety margin."""
        assert self.predicted_gb is not None
        assert self.published_gb is not None
        return self.predicted_gb / (1 - SAFETY_MARGIN) < self.published_gb

    def text(self, column: str) -> str:
        """Return a cell, stripped; empty where the table has no such column."""
        return (self.cells.get(column) or "").strip()

    def number(self, column: str) -> int:
        """Return a cell that must hold a whole positive number."""
        text = self.text(column)
        if not re.fullmatch(r"[1-9]\d{0,8}(\.0+)?", text):
            raise Unusable(f"{column} is not stated" if not text else f"{column} '{text}' is no whole number")
        return int(float(text))


def published_gb(row: Row) -> float:
    """Return the row's peak in decimal GB, from the value as printed where the column for GB is empty.

    Raises:
        Unusable: there is none, or none that memory can have.
    """
    text, unit = row.text("peak_mem_gb"), 1.0
    if not text:
        text, unit = row.text("peak_mem_value"), UNITS.get(row.text("peak_mem_unit").lower(), 0.0)
    if not text:
        raise Unusable("no peak is published")
    if not unit:
        raise Unusable(f"a peak in '{row.text('peak_mem_unit')}'")
    try:
        size = float(text) * unit
    except ValueError:
        raise Unusable(f"a peak of '{text}' is no number") from None
    if not 0.01 < size < 1e5:
        raise Unusable(f"a peak of {size:g} GB")
    return size


def metric_of(row: Row) -> str:
    """Return which memory the row's peak is of: "allocated", "active", "reserved" or "nvidia-smi".

    Raises:
        Unusable: none of these, or reserved memory that says nothing about what was needed.
    """
    text, stack = row.text("mem_metric"), stack_of(row.text("repo"))
    words = ("reserved", "nvidia-smi", "allocated", "active")
    metric = next((word for word in words if word in text.lower()), "")
    if not metric and re.fullmatch(r"peak( memory| per gpu)?", text.lower()):
        metric = stack.peak_is
    if not metric:
        raise Unusable(f"metric '{text}' is neither allocated nor reserved memory")
    lengths_vary = re.search(r"\b(longest|truncated|varying|samples)\b", row.text("seq_note").lower()) is not None
    if metric in ("reserved", "nvidia-smi") and lengths_vary and not stack.empties_cache:
        raise Unusable(f"{metric} memory of varying lengths: a cache that is never emptied grows beyond any need")
    return metric
