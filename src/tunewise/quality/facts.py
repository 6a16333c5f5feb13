"""Which training facts the model knows already, before training: SliCK (Gekhman et al. 2024, arXiv 2405.05904).

Each question is asked with several few-shot prompts, once greedily and several times at a temperature:

    highly known   every greedy answer is right
    maybe known    some greedy answer is right
    weakly known   no greedy answer is right, but a sampled one is
    unknown        none is

Facts that are unknown are learnt slowly, and once learnt they raise hallucination on what was known; the paper's fit on
PaLM 2-M is accuracy = 36.9 + 7.3 known/all - 8.3 unknown/all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tunewise.quality.answers import kind_of
from tunewise.quality.generate import Sampling
from tunewise.quality.measured import Measured
from tunewise.quality.questions import Question
from tunewise.quality.refusals import Refusals
from tunewise.quality.statistics import rate
from tunewise.recipe import Value

Category = Literal["highly known", "maybe known", "weakly known", "unknown"]
CATEGORIES: tuple[Category, ...] = ("highly known", "maybe known", "weakly known", "unknown")

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


def category_of(greedy: Sequence[bool], sampled: Sequence[bool]) -> Category:
    """Return a fact's category from whether its greedy and its sampled answers are right."""
    if greedy and all(greedy):
        return "highly known"
    if any(greedy):
        return "maybe known"
    return "weakly known" if any(sampled) else "unknown"


def few_shot_texts(questions: Sequence[Question], examples: Sequence[Question], seed: int = 0) -> list[list[str]]:
    """Return for each question `NUM_PROMPTS` texts, with `NUM_SHOTS` other questions and their answers in front."""
    generator = np.random.default_rng(seed)
    texts = []
    for question in questions:
        others = [example for example in examples if example.text != question.text and example.references]
        prompts = []
        for _ in range(NUM_PROMPTS):
            order = generator.permutation(len(others))[:NUM_SHOTS]
            shots = "".join(f"{others[i].text}{_gap(others[i].text)}{others[i].references[0]}\n\n" for i in order)
            prompts.append(shots + question.text)
        texts.append(prompts)
    return texts


def _gap(prompt: str) -> str:
    return "" if prompt[-1:].isspace() else " "


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
    """Say whether the first line of an answer is right; few-shot prompts make models go on with the next question."""
    return kind_of(answer.strip().split("\n")[0], question.references, refusals) == "right"


GREEDY = Sampling(max_new_tokens=24)
SAMPLED = Sampling(max_new_tokens=24, temperature=TEMPERATURE, num_samples=NUM_SAMPLES)
