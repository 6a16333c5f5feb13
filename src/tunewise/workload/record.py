"""What a record is: named fields as they stood in the user's file, and the place where they stood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One raw record.

    Attributes:
        fields: the record's fields under the names that the user gave them.
        origin: its place, for people: "train.jsonl:17" (line), "train.json[17]" (index from 0), "train.csv
            row 17" (data rows from 1) or "notes.txt" (a whole file).
    """

    fields: dict[str, Any]
    origin: str
