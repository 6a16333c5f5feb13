"""When an answer is a right one: equal to it, or holding it, up to case, punctuation and articles (SQuAD's rule)."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text without case, punctuation, articles and needless blanks."""
    return " ".join(_ARTICLES.sub(" ", text.casefold().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 when the normalised answer equals a right one."""
    return float(any(normalised(answer) == normalised(reference) for reference in references))


def contains(answer: str, references: Sequence[str]) -> float:
    """Return 1 when a right answer stands in the answer as whole words."""
    said = f" {normalised(answer)} "
    return float(any(f" {wanted} " in said for reference in references if (wanted := normalised(reference))))
