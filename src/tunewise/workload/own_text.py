"""Replay of what the base says itself: nothing of its former data is needed, and nothing is drawn that it never knew.

Text that the base goes on with from nothing rehearses its whole distribution; its answers to the training's own
prompts rehearse how it would have answered. References: self-synthesized rehearsal, Huang et al. 2024 (arXiv
2403.01244); "nearly eliminates forgetting", but not where the model is near its capacity (2605.26097); on-policy data
forget less than others' (Shenfeld et al. 2025, 2509.04259).
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from tunewise.errors import InputError
from tunewise.recipe import OWN_TEXTS, ReplaySpec
from tunewise.workload.base_voice import BaseVoice, TokenIds, asked
from tunewise.workload.corpus import Corpus
from tunewise.workload.general_text import first_tokens

PROMPTS_AT_ONCE = 64
"""The base answers so many prompts before it is looked whether these are enough."""

MOST_ROUNDS = 8
"""How often all prompts are asked, where their answers are too short to be enough."""

FEWEST_ANSWER_TOKENS = 16
"""Room for an answer; a prompt that leaves less is not asked."""


def own_corpus(
    train: Corpus,
    replay: ReplaySpec,
    base: BaseVoice | None,
    *,
    piece: int,
    num_tokens: int,
    max_length: int,
    seed: int,
) -> Corpus:
    """Return what the base says, `num_tokens` supervised tokens of it, to the token.

    Args:
        train: the training documents, whose prompts "self_answers" asks.
        replay: its `source` says what is asked for.
        base: the base model.
        piece: tokens of a text.
        num_tokens: supervised ones; all of a text is, and of an answer the answer.
        max_length: of a prompt and its answer together.
        seed: of what is drawn.

    Raises:
        InputError: there is no base to ask, it says nothing, or there are too few prompts.
    """
    voice = asked(base, f"data.replay.source: {replay.source}")
    if replay.source == OWN_TEXTS:
        texts = voice.texts(num_tokens + num_tokens // piece + 1, piece, seed)  # a text's first token is no target
        marked = [(ids, np.ones(len(ids), dtype=np.bool_)) for ids in texts if len(ids) > 1]
    else:
        marked = _answers(train, voice, piece, num_tokens, max_length, seed)
    found = Corpus.from_documents(marked, [f"the base's own ({replay.source})"] * len(marked))
    return first_tokens(found, np.arange(len(found)), num_tokens)


def _answers(
    train: Corpus, voice: BaseVoice, piece: int, num_tokens: int, max_length: int, seed: int
) -> list[tuple[TokenIds, NDArray[np.bool_]]]:
    """Ask prompts of the training, drawn at random, until the answers hold enough tokens."""
    prompts = []
    for index in np.random.default_rng(seed).permutation(len(train)):
        ids, marks = train.document(int(index))
        start = last_answer(marks)
        if start > 1 and start + FEWEST_ANSWER_TOKENS <= max_length:
            prompts.append(tuple(ids[:start].tolist()))
    if not prompts:
        raise InputError(
            "data.replay.source: self_answers: no training document has a prompt that leaves room for an answer."
        )
    marked, held = [], 0
    starts = range(0, len(prompts), PROMPTS_AT_ONCE)
    for number, first in enumerate(itertools.chain(*[starts] * MOST_ROUNDS)):
        some = prompts[first : first + PROMPTS_AT_ONCE]
        room = min(max_length - max(map(len, some)), max(piece, FEWEST_ANSWER_TOKENS))
        for prompt, answer in zip(some, voice.answers(some, room, seed + number), strict=True):
            if answer:
                marks = np.repeat([False, True], [len(prompt), len(answer)])
                marked.append((prompt + answer, marks))
                held += len(answer)
        if held >= num_tokens:
            break
    return marked


def last_answer(marks: NDArray[np.bool_]) -> int:
    """Return where the last run of supervised tokens begins; 0 when nothing is supervised."""
    places = np.flatnonzero(marks)
    if len(places) == 0:
        return 0
    unsupervised = np.flatnonzero(~marks[: places[-1]])
    return int(unsupervised[-1]) + 1 if len(unsupervised) else 0
