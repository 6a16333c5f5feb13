"""Does the answer change when, and only when, it should: pairs of one question in two forms.

    same answer wanted       the record's own paraphrase; fields in another order; a distracting sentence
    other answer wanted      the record's own changed constraint

Orders and distractors are made here, from any question; a paraphrase and a changed constraint need the record's fields
`paraphrase` (text, or a list of them) and `changed` (text), because only its author knows what means the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from tunewise.quality.battery import Items
from tunewise.quality.questions import Question, question_of
from tunewise.workload.conversation import Conversation
from tunewise.workload.matching import normalised

Change = Literal["paraphrase", "reordered", "distractor", "changed"]

DISTRACTOR = "The weather was fine that day."
"""A sentence that changes nothing about any question."""

_FIELD_LINE = re.compile(r"^[A-Za-z][\w /-]{0,30}:\s*\S.*$")


@dataclass(frozen=True, eq=False)
class Pair:
    """One question and its other form; `same` says whether the answer should stay."""

    question: Question
    other: Question
    change: Change
    same: bool


def pairs_of(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Return every pair that can be made of the questions."""
    pairs = []
    for question in questions:
        asked = asked_text(question.conversation)
        given = question.fields.get("paraphrase")
        paraphrases = given if isinstance(given, list) else [given]
        forms: list[tuple[Change, str, bool]] = [("paraphrase", str(text), True) for text in paraphrases if text]
        if (moved := reordered(asked)) is not None:
            forms.append(("reordered", moved, True))
        forms.append(("distractor", f"{DISTRACTOR} {asked}", True))
        if question.fields.get("changed"):
            forms.append(("changed", str(question.fields["changed"]), False))
        for change, text, same in forms:
            other = with_text(question, text, tokenizer)
            pairs.append(Pair(question, other, change, same))
    return pairs


def asked_text(conversation: Conversation) -> str:
    """Return what the last user turn says."""
    return next((turn.content for turn in reversed(conversation.messages) if turn.role == "user"), "")


def with_text(question: Question, text: str, tokenizer: PreTrainedTokenizerBase) -> Question:
    """Return the question with another last user turn, laid out as before."""
    conversation, before = question.conversation, asked_text(question.conversation)
    turns = list(conversation.messages)
    last = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is not None:
        turns[last] = replace(turns[last], content=text)
    plain = conversation.plain_prompt
    if plain is not None:
        head, found, tail = plain.rpartition(before)
        plain = head + text + tail if found else text
    changed = replace(conversation, messages=tuple(turns), plain_prompt=plain)
    return question_of(changed, question.fields, question.references, tokenizer)


def reordered(text: str) -> str | None:
    """Return the text with its block of "Name: value" lines in reverse order; None when it has no such block."""
    lines = text.split("\n")
    marked = [bool(_FIELD_LINE.match(line)) for line in lines]
    for start in range(len(lines)):
        end = start
        while end < len(lines) and marked[end]:
            end += 1
        if end - start >= 2:
            return "\n".join([*lines[:start], *reversed(lines[start:end]), *lines[end:]])
    return None


def consistency_items(pairs: Sequence[Pair], answers: Sequence[tuple[str, str]]) -> dict[str, Items]:
    """Return for each kind of change whether the answer changed exactly when it should, item by item.

    Answers are compared up to case, punctuation and articles.
    """
    outcomes: dict[str, list[bool]] = {}
    for pair, (one, other) in zip(pairs, answers, strict=True):
        stays = normalised(one) == normalised(other)
        name = f"{'kept' if pair.same else 'changed'} after: {pair.change}"
        outcomes.setdefault(name, []).append(stays == pair.same)
    return {name: Items.of(found) for name, found in outcomes.items()}
