"""How well a model knows facts: SliCK (Gekhman et al. 2024, arXiv 2405.05904).

Each question is asked with several few-shot prompts, once greedily and several times at a temperature:

    highly known   every greedy answer is right
    maybe known    some greedy answer is right
    weakly known   no greedy answer is right, but a sampled one is
    unknown        none is
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunewise.engine.generate import Progress, Sampling, generate
from tunewise.methods.method import Run
from tunewise.workload.tokens import bos_ids

Category = Literal["highly known", "maybe known", "weakly known", "unknown"]
CATEGORIES: tuple[Category, ...] = ("highly known", "maybe known", "weakly known", "unknown")


def category_of(greedy: Sequence[bool], sampled: Sequence[bool]) -> Category:
    """Return a fact's category from whether its greedy and its sampled answers are right."""
    if greedy and all(greedy):
        return "highly known"
    if any(greedy):
        return "maybe known"
    return "weakly known" if any(sampled) else "unknown"


def few_shot_texts(
    questions: Sequence[str], shots: Sequence[tuple[str, str]], num_prompts: int, num_shots: int, seed: int = 0
) -> list[list[str]]:
    """Return for each question `num_prompts` texts, with `num_shots` other questions and their answers in front.

    Args:
        questions: what is asked.
        shots: (question, answer) pairs, of which others than the question itself are chosen.
        num_prompts, num_shots: how many.
        seed: of the choice.
    """
    generator = np.random.default_rng(seed)
    texts = []
    for question in questions:
        others = [shot for shot in shots if shot[0] != question]
        prompts = []
        for _ in range(num_prompts):
            order = generator.permutation(len(others))[:num_shots]
            front = "".join(f"{others[i][0]}{_gap(others[i][0])}{others[i][1]}\n\n" for i in order)
            prompts.append(front + question)
        texts.append(prompts)
    return texts


def _gap(prompt: str) -> str:
    return "" if prompt[-1:].isspace() else " "


def first_line(answer: str) -> str:
    """Return what counts of an answer: few-shot prompts make models go on with the next question."""
    return answer.strip().split("\n")[0]


def slick(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    is_right: Callable[[int, str], bool],
    samplings: Sequence[Sampling],
    context: int,
    progress: Progress = lambda done, total: None,
) -> list[Category]:
    """Return the category of each fact.

    Args:
        run: the model, in evaluation mode while it answers.
        tokenizer: its own.
        texts: for each fact its prompts, equally many; a prompt that leaves no room for an answer keeps its end.
        is_right: says of a fact's number and the first line of an answer whether it is right.
        samplings: the greedy one, then one that draws, or none.
        context: the most positions that the model knows.
        progress: told while answers are generated.
    """
    bos, room = bos_ids(tokenizer), max(1, context - max(each.max_new_tokens for each in samplings))
    prompts = [
        [*bos, *tokenizer(text, add_special_tokens=False).input_ids[-max(1, room - len(bos)) :]]
        for each in texts
        for text in each
    ]
    rights: list[list[list[bool]]] = []
    for sampling in samplings:
        found = generate(run, tokenizer, prompts, sampling, progress)
        of_fact: list[list[bool]] = [[] for _ in texts]
        numbers = [number for number, each in enumerate(texts) for _ in each]
        for number, some in zip(numbers, found, strict=True):
            of_fact[number] += [is_right(number, first_line(answer.text)) for answer in some]
        rights.append(of_fact)
    sampled = rights[1] if len(rights) > 1 else [[] for _ in texts]
    return [category_of(greedy, drawn) for greedy, drawn in zip(rights[0], sampled, strict=True)]
