"""Right, wrong or abstained: the three things that an answer to a question of fact can be.

hallucination   wrong / (right + wrong + abstained)
abstention      recall on questions without answer, false refusals on those with one, and the F1 of both
accuracy at coverage   right answers among the most confident share
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunewise.quality.battery import Items
from tunewise.quality.refusals import Refusals
from tunewise.workload.matching import contains, exact_match

Kind = Literal["right", "wrong", "abstained"]


def kind_of(answer: str, references: Sequence[str], refusals: Refusals) -> Kind:
    """Sort an answer: silence and refusals abstain; on a question without answer, whatever else is said is wrong."""
    if references and exact_match(answer, references):
        return "right"  # also where the right answer itself reads like a refusal
    if not answer.strip() or refusals.matches(answer):
        return "abstained"
    return "right" if references and contains(answer, references) else "wrong"


def answer_items(kinds: Sequence[Kind], has_answer: Sequence[bool]) -> dict[str, Items]:
    """Return the rates over the questions with an answer, and over those without, item by item."""
    asked = [kind for kind, answerable in zip(kinds, has_answer, strict=True) if answerable]
    unanswerable = [kind for kind, answerable in zip(kinds, has_answer, strict=True) if not answerable]
    found = {}
    if asked:
        found["right"] = Items.of([kind == "right" for kind in asked])
        found["wrong"] = Items.of([kind == "wrong" for kind in asked], -1)
        found["false refusals"] = Items.of([kind == "abstained" for kind in asked], -1)
    if unanswerable:
        found["refused, without answer"] = Items.of([kind == "abstained" for kind in unanswerable])
    return found


def abstention_f1(kinds: Sequence[Kind], has_answer: Sequence[bool]) -> float:
    """Return the F1 of abstaining exactly where there is no answer (SQuAD 2's NoAns side)."""
    abstained = np.array([kind == "abstained" for kind in kinds])
    should = ~np.array(has_answer, dtype=bool)
    hits = int((abstained & should).sum())
    return 2 * hits / int(abstained.sum() + should.sum()) if hits else 0.0


def accuracy_at_coverage(is_right: NDArray[np.bool_], confidence: NDArray[np.float64], coverage: float) -> float:
    """Return the share of right answers among the `coverage` most confident ones (at least one)."""
    num = max(1, round(coverage * len(is_right)))
    most = np.argsort(-confidence, kind="stable")[:num]
    return float(is_right[most].mean())
