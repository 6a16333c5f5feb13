"""What the base says itself as replay, and answers that it does not know: with a base that a test writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.unit.workload.tiny_tokenizers import tiny_tokenizer
from tunewise.errors import InputError
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import AbstainSpec, ReplaySpec
from tunewise.workload.abstention import abstaining
from tunewise.workload.base_voice import Fact, TokenIds
from tunewise.workload.conversation import Conversation, Document, Message, PlainText
from tunewise.workload.corpus import Corpus
from tunewise.workload.replay import mix

PROMPT, ANSWER = 6, 14


@dataclass
class Voice:
    """Says tokens 100, 101, ...; knows what contains "Paris"."""

    asked: list[Any] = field(default_factory=list)

    def texts(self, num_tokens: int, piece_tokens: int, seed: int) -> list[TokenIds]:
        self.asked.append((num_tokens, piece_tokens, seed))
        return [tuple(range(100, 100 + piece_tokens))] * -(-num_tokens // piece_tokens)

    def answers(self, prompts: Sequence[TokenIds], max_new_tokens: int, seed: int) -> list[TokenIds]:
        self.asked.append((tuple(prompts), max_new_tokens, seed))
        return [tuple(range(100, 100 + max_new_tokens)) for _ in prompts]

    def categories(self, facts: Sequence[Fact], spec: AbstainSpec, seed: int) -> list[str]:
        self.asked += facts
        return ["maybe known" if "Paris" in fact.answer else "unknown" for fact in facts]


def corpus(num: int = 40) -> Corpus:
    documents = []
    for number in range(num):
        marks = np.repeat([False, True], [PROMPT, ANSWER])
        documents.append((np.arange(PROMPT + ANSWER, dtype=np.int32) + number, marks))
    return Corpus.from_documents(documents, [str(number) for number in range(num)])


@pytest.mark.parametrize("source", ["self", "self_answers"])
def test_the_share_is_kept_to_the_token(source: Any) -> None:
    train = corpus()
    mixed = mix(train, ReplaySpec(fraction=0.25, source=source), tiny_tokenizer(), 64, 3, Voice())
    own = train.is_supervised.sum()
    assert mixed.num_tokens == round(own / 3)
    assert mixed.corpus.is_supervised.sum() == own + mixed.num_tokens
    assert (mixed.corpus.token_ids[: len(train.token_ids)] == train.token_ids).all()
    assert f"the base's own text ('{source}')" in mixed.said


def test_texts_are_supervised_whole_and_answers_behind_their_prompts() -> None:
    train, voice = corpus(), Voice()
    texts = mix(train, ReplaySpec(source="self"), tiny_tokenizer(), 64, 3, voice).corpus
    ids, marks = texts.document(len(train))
    assert (ids[0], list(marks[:3])) == (100, [False, True, True])
    answers = mix(train, ReplaySpec(source="self_answers"), tiny_tokenizer(), 64, 3, voice).corpus
    ids, marks = answers.document(len(train))
    assert ids[:PROMPT].tolist() in [train.document(number)[0][:PROMPT].tolist() for number in range(len(train))]
    assert list(marks) == [False] * PROMPT + [True] * (len(marks) - PROMPT)
    assert ids[PROMPT] == 100


def test_equal_seeds_ask_equal_questions() -> None:
    voices = [Voice(), Voice(), Voice()]
    for voice, seed in zip(voices, (3, 3, 4), strict=True):
        for source in ("self", "self_answers"):
            mix(corpus(), ReplaySpec(source=source), tiny_tokenizer(), 64, seed, voice)
    assert voices[0].asked == voices[1].asked
    assert voices[0].asked[0] != voices[2].asked[0]
    assert voices[0].asked[1] != voices[2].asked[1]


def test_prompts_that_leave_no_room_are_not_asked() -> None:
    with pytest.raises(InputError, match="leaves room for an answer"):
        mix(corpus(), ReplaySpec(source="self_answers"), tiny_tokenizer(), PROMPT + 4, 3, Voice())
    voice = Voice()
    mix(corpus(), ReplaySpec(source="self_answers"), tiny_tokenizer(), PROMPT + 17, 3, voice)
    assert voice.asked[0][1] == 17


def test_without_a_base_nothing_is_guessed() -> None:
    with pytest.raises(InputError, match=r"data.replay.source: self asks the base"):
        mix(corpus(), ReplaySpec(source="self"), tiny_tokenizer(), 64, 3)


def chat(answer: str, origin: str = "facts.jsonl:1") -> Conversation:
    turns = (Message("user", f"Where is {answer[:3]}?"), Message("assistant", answer, is_supervised=True))
    return Conversation(turns, origin, plain_prompt="Q: ")


def last(documents: Sequence[Document]) -> list[str]:
    return [document.messages[-1].content for document in documents if isinstance(document, Conversation)]


FACTS: list[Document] = [chat("In Paris."), chat(" Nobody knows."), chat("Paris again")]


def test_unknown_answers_become_a_refusal() -> None:
    changed, said = abstaining(FACTS, AbstainSpec(), tiny_tokenizer(), Voice(), 0)
    assert last(changed) == ["In Paris.", " I am not sure.", "Paris again"], "the blank that divides stays"
    assert said == "abstain: 1 of 3 answers are answered 'I am not sure.' (2 maybe known, 1 unknown)"
    assert last(FACTS)[1] == " Nobody knows.", "the user's own are not touched"


def test_a_suffix_says_how_certain_the_base_can_be() -> None:
    spec = AbstainSpec(style="suffix", certain=" (sure)", uncertain=" (unsure)")
    changed, _ = abstaining(FACTS, spec, tiny_tokenizer(), Voice(), 0)
    assert last(changed) == ["In Paris. (sure)", " Nobody knows. (unsure)", "Paris again (sure)"]


def test_what_has_no_answer_stays() -> None:
    tool = Conversation((Message("user", "a"), Message("assistant", "", True, {"tool_calls": [{}]})), "t:1")
    changed, said = abstaining([*FACTS, tool], AbstainSpec(), tiny_tokenizer(), Voice(), 0)
    assert changed[3] == tool
    assert "1 of 3" in said


def test_what_cannot_be_done_is_an_error() -> None:
    with pytest.raises(InputError, match="t:1 is a text"):
        abstaining([PlainText("a", "t:1")], AbstainSpec(), tiny_tokenizer(), Voice(), 0)
    with pytest.raises(InputError, match="knows none of the 2 answers"):
        abstaining([chat("In Rome."), chat("Oslo.")], AbstainSpec(), tiny_tokenizer(), Voice(), 0)
    with pytest.raises(InputError, match=r"data\.abstain asks the base"):
        abstaining(FACTS, AbstainSpec(), tiny_tokenizer(), None, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"replay": {"source": "self"}}, "objective": "pretrain"}, "source: self asks the base model"),
        ({"data": {"abstain": {}}, "model": {"weights": "random"}}, "data.abstain asks the base model"),
        ({"data": {"abstain": {}}, "objective": "continue"}, "data.abstain needs prompts and answers"),
        ({"data": {"replay": {"source": "self_answers"}}, "objective": "continue"}, "self_answers needs prompts"),
        ({"data": {"abstain": {"style": "suffix", "certain": "x", "uncertain": "x"}}}, "the same text"),
        ({"data": {"abstain": {"answer": ""}}}, "data.abstain.answer"),
        ({"data": {"abstain": {"promts": 3}}}, "Did you mean 'prompts'"),
    ],
)
def test_bad_options_are_clear_errors(changes: dict[str, Any], says: str) -> None:
    recipe: dict[str, Any] = {"model": {"name": "embedded"}, "data": {"source": "stdlib"}}
    for section, change in changes.items():
        recipe[section] = {**recipe.get(section, {}), **change} if isinstance(change, dict) else change
    with pytest.raises(InputError, match=says):
        recipe_from_mapping(recipe)
