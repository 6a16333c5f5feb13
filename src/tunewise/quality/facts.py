"""Which training facts the model knows already, before training: SliCK (Gekhman et al. 2024, arXiv 2405.05904).

How each fact is asked and sorted is in `engine.knowledge`.

Facts that are unknown are learnt slowly, and once learnt they raise hallucination on what was known; the paper's fit on
PaLM 2-M is accuracy = 36.9 + 7.3 known/all - 8.3 unknown/all.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunewise.engine.generate import Sampling
from tunewise.engine.knowledge import CATEGORIES, Category
from tunewise.quality.answers import kind_of
from tunewise.quality.measured import Measured
from tunewise.quality.questions import Question
from tunewise.quality.refusals import Refusals
from tunewise.quality.statistics import rate
from tunewise.recipe import Value

NUM_PROMPTS = 4
NUM_SHOTS = 4
NUM_SAMPLES = 4
TEMPERATURE = 0.5
MUCH_UNKNOWN = 0.2


class Facts(Value):
    """How many facts of each category there are, and what follows.

    Attributes:
        shares: of each category.
        warning: what the shares imply for training; "" where nothing does.
    """

    shares: dict[str, Measured]
    warning: str


def facts_of(categories: Sequence[Category]) -> Facts:
    """Return the shares and the warning that they imply."""
    counts = {name: sum(category == name for category in categories) for name in CATEGORIES}
    shares: dict[str, Measured] = {name: rate(count, len(categories)) for name, count in counts.items()}
    unknown = shares["unknown"]
    warning = ""
    if categories and unknown.low > MUCH_UNKNOWN:
        warning = (
            f"{unknown.middle:.0%} of the facts are unknown to the model ({unknown.low:.0%} to {unknown.high:.0%}). "
            "Learning them by fine-tuning raises hallucination on what it knows: stop early, leave them out, or let it "
            "answer that it does not know (Gekhman et al. 2024)."
        )
    return Facts(shares=shares, warning=warning)


def is_right(answer: str, question: Question, refusals: Refusals) -> bool:
    """Say whether an answer (its first line) is right."""
    return kind_of(answer, question.references, refusals) == "right"


GREEDY = Sampling(max_new_tokens=24)
SAMPLED = Sampling(max_new_tokens=24, temperature=TEMPERATURE, num_samples=NUM_SAMPLES)
