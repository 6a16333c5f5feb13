"""Questions out of a data file: what is asked, laid out as in training, and every answer that counts as right.

Any of tunewise's data formats; an answer may be a list of right ones, and an empty list marks a question that has no
answer (as in SQuAD 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunewise.errors import InputError
from tunewise.recipe import Recipe
from tunewise.workload.conversation import Conversation, Message
from tunewise.workload.detection import find_mapping
from tunewise.workload.record import Record
from tunewise.workload.records import read_records
from tunewise.workload.tokens import bos_ids, renderer_for

ANSWER_FIELDS = ("answers", "answer", "references", "reference", "completion", "output", "response", "target")
NO_ANSWER = "I do not know."
"""What stands for the answer of a question that has none, where something must stand."""


@dataclass(frozen=True, eq=False)
class Question:
    """One question.

    Attributes:
        ids: the prompt's tokens, as they stand before an answer in training.
        text: the prompt as text.
        references: the answers that are right; none for a question that has no answer.
        conversation: the record in the normal form, its answer included.
        fields: the record as it stood in the file.
        origin: its place.
    """

    ids: tuple[int, ...]
    text: str
    references: tuple[str, ...]
    conversation: Conversation
    fields: Mapping[str, Any]
    origin: str

    @property
    def has_answer(self) -> bool:
        """Whether it can be answered."""
        return bool(self.references)


def read_questions(
    source: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_records: int | None = None
) -> list[Question]:
    """Read questions, with the recipe's field names and system prompt.

    Raises:
        InputError: the file cannot be read, its records are texts and not questions, or there are none.
    """
    records = list(read_records(source, max_records))
    if not records:
        raise InputError(f"{source}: there are no records.")
    listed = [_references(record) for record in records]
    plain = [_with_one_answer(record, answers) for record, answers in zip(records, listed, strict=True)]
    mapping = find_mapping(plain, recipe.data.format, recipe.data.fields)
    questions = []
    for record, single, answers in zip(records, plain, listed, strict=True):
        document = mapping.convert(single)
        if not isinstance(document, Conversation):
            raise InputError(f"{record.origin}: this is a text without question and answer.")
        if recipe.data.system_prompt is not None:
            document = document.with_system_prompt(recipe.data.system_prompt)
        questions.append(question_of(document, record.fields, answers, tokenizer))
    return questions


def question_of(
    conversation: Conversation,
    fields: Mapping[str, Any],
    answers: tuple[str, ...] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Question:
    """Lay a conversation out as far as its last answer.

    Args:
        conversation: whose last turn is the answer.
        fields: the record.
        answers: all right answers; None: the last turn is the only one.
        tokenizer: whose template lays it out.

    Raises:
        InputError: there is no answer's place, or the template refuses the conversation.
    """
    last = conversation.messages[-1] if conversation.messages else None
    if last is None or last.role != "assistant":
        raise InputError(f"{conversation.origin}: the last turn is not an answer.")
    references = (last.content,) if answers is None else answers
    if not last.content.strip() or not last.is_supervised:
        spoken = Message("assistant", last.content.strip() or NO_ANSWER, is_supervised=True)
        conversation = replace(conversation, messages=(*conversation.messages[:-1], spoken))
    rendered = renderer_for(tokenizer).render(conversation)
    if not rendered.spans:
        raise InputError(f"{conversation.origin}: the chat template leaves the answer out.")
    text = rendered.text[: rendered.spans[-1][0]]
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    if rendered.takes_bos and list(ids[:1]) != bos_ids(tokenizer):
        ids = (*bos_ids(tokenizer), *ids)
    return Question(ids, text, tuple(references), conversation, fields, conversation.origin)


def _references(record: Record) -> tuple[str, ...] | None:
    """Return a record's right answers where it has a list of them; None where it has one answer, or none."""
    for name in ANSWER_FIELDS:
        value = record.fields.get(name)
        if isinstance(value, dict) and isinstance(value.get("text"), list):  # SQuAD's {"text": [...]}
            value = value["text"]
        if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
            return tuple(str(item) for item in value)
    return None


def _with_one_answer(record: Record, answers: tuple[str, ...] | None) -> Record:
    """Return the record with its first right answer in the place of the list."""
    if answers is None:
        solution = record.fields.get("canonical_solution")  # HumanEval's name for it
        return record if solution is None else Record({**record.fields, "completion": solution}, record.origin)
    name = next(name for name in ANSWER_FIELDS if isinstance(record.fields.get(name), list | dict))
    return Record({**record.fields, name: answers[0] if answers else NO_ANSWER}, record.origin)
