"""Is an answer a refusal: "I do not know", "I cannot answer that"? Decided by what it says near its beginning.

A pattern is a lower bound: a refusal in other words, or in another language, needs a pattern of the user's own
(`quality.refusals`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tunewise.errors import InputError

PATTERNS = (
    r"\bi (?:do not|don't|don’t) (?:know|have (?:enough|that|any|the) (?:information|data))",
    r"\bi(?: am|'m|’m) (?:not sure|unsure|unable|not able|sorry)",
    r"\bi (?:cannot|can't|can’t|can not|am unable to|won't|will not) (?:answer|help|assist|tell|say|provide|comply)",
    r"\b(?:cannot|can't|can’t|can not) be (?:answered|determined|known)",
    r"\b(?:not enough|insufficient) (?:information|context|evidence)\b",
    r"^(?:(?:it|this|that|the answer|the question) is )?(?:unanswerable|unknown|no answer|not (?:stated|given))\b",
    r"^(?:sorry|i apologi[sz]e)\b",
    r"\bas an ai\b",
)
"""English refusals."""

_LOOKED_AT = 160
"""Characters from the beginning in which a refusal must stand."""


class Refusals:
    """Tells refusals from answers."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        """Take the built-in patterns and the user's own.

        Raises:
            InputError: one of them is no regular expression.
        """
        for pattern in more:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"quality.refusals: '{pattern}' is no regular expression: {error}.") from None
        self._pattern = re.compile("|".join(f"(?:{pattern})" for pattern in (*PATTERNS, *more)), re.IGNORECASE)

    def matches(self, answer: str) -> bool:
        """Say whether the answer refuses."""
        return self._pattern.search(answer.strip()[:_LOOKED_AT]) is not None
