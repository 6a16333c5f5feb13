"""Counts of what was noticed or done on the way from records to tokens, with the first few places of each."""

from __future__ import annotations

import enum
from collections import Counter

EXAMPLES = 5


class Event(enum.StrEnum):
    """Everything that can happen to a record and must be told; `doctor` says what each means and what to
    do."""

    EMPTY = "empty"
    EMPTY_PROMPT = "empty prompt"
    NOTHING_SUPERVISED = "nothing supervised"
    CUT = "cut"
    ANSWER_CUT_AWAY = "answer cut away"
    DROPPED_TOO_LONG = "dropped, too long"
    SPLIT = "split"
    RUN_TOGETHER = "prompt runs into answer"
    BLANK_JOINED = "prompt ends with a blank that belongs to the answer's first token"
    STRADDLING = "boundary inside a token"
    END_ADDED = "EOS added behind the template"
    TURN_REWRITTEN = "template rewrites a turn"
    CONTENT_DROPPED = "template drops content"
    SPECIAL_TOKEN_IN_TEXT = "special token in text"
    REPLACEMENT_CHARACTER = "replacement character"
    MOJIBAKE = "mojibake"
    CONTROL_CHARACTER = "control character"


class Tally:
    """How often each event happened, and where first."""

    def __init__(self) -> None:
        self._counts: Counter[Event] = Counter()
        self._origins: dict[Event, list[str]] = {}

    def add(self, event: Event, origin: str) -> None:
        """Count one event at `origin`."""
        self._counts[event] += 1
        origins = self._origins.setdefault(event, [])
        if len(origins) < EXAMPLES and origin not in origins:
            origins.append(origin)

    def merge(self, later: Tally) -> None:
        """Add what was counted in records that come behind all of these."""
        self._counts.update(later._counts)
        for event, origins in later._origins.items():
            known = self._origins.setdefault(event, [])
            known += [origin for origin in origins if origin not in known][: EXAMPLES - len(known)]

    def count(self, event: Event) -> int:
        """Return how often the event happened."""
        return self._counts[event]

    def origins(self, event: Event) -> tuple[str, ...]:
        """Return the first places of the event, at most five."""
        return tuple(self._origins.get(event, ()))
