"""Token ids and marks: what is learnt is the answers and their ends, whatever the template."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.unit.workload import tiny_tokenizers as tiny
from tests.unit.workload.tiny_tokenizers import tiny_tokenizer
from tunewise.errors import InputError
from tunewise.workload.conversation import Conversation, Document, Message, PlainText
from tunewise.workload.tally import Event
from tunewise.workload.tokens import Tokenized, tokenize

BOS, EOS, TURN_END = 1, 2, 4


def _chat(*turns: str, system: str | None = None) -> Conversation:
    messages = [Message("system", system)] if system is not None else []
    for number, content in enumerate(turns):
        messages.append(Message("assistant", content, True) if number % 2 else Message("user", content))
    return Conversation(tuple(messages), "chat.jsonl:1")


def _completion(prompt: str, answer: str) -> Conversation:
    return Conversation(_chat(prompt, answer).messages, "pair.jsonl:1", plain_prompt=prompt)


def _one(document: Document, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Tokenized:
    return tokenize([document], tokenizer, **({"max_length": 10_000} | options))


def _learnt(data: Tokenized, tokenizer: PreTrainedTokenizerFast) -> str:
    ids, marks = data.corpus.document(0)
    return str(tokenizer.decode(ids[marks].tolist()))


def _text(data: Tokenized, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(data.corpus.token_ids.tolist()))


def test_plain_completion_has_one_bos_and_learns_answer_and_eos() -> None:
    tokenizer = tiny_tokenizer()
    data = _one(_completion("What is two?\n", "five"), tokenizer)
    assert _text(data, tokenizer) == "<s>What is two?\nfive</s>"
    assert _learnt(data, tokenizer) == "five</s>"
    assert data.corpus.token_ids.tolist().count(BOS) == 1


def test_no_bos_where_the_tokenizer_adds_none() -> None:
    tokenizer = tiny_tokenizer(adds_bos=False)
    assert BOS not in _one(_completion("a\n", "b"), tokenizer).corpus.token_ids


def test_bos_and_eos_in_the_text_are_not_doubled() -> None:
    tokenizer = tiny_tokenizer()
    assert _text(_one(PlainText("<s>once</s>", "x"), tokenizer), tokenizer) == "<s>once</s>"
    assert _text(_one(_completion("<s>a\n", "b</s>"), tokenizer), tokenizer) == "<s>a\nb</s>"


def test_chat_without_template_ends_every_answer_with_eos() -> None:
    tokenizer = tiny_tokenizer()
    data = _one(_chat("one", "two", "three", "four", system="be kind"), tokenizer)
    assert _text(data, tokenizer) == (
        "<s>### System:\nbe kind\n\n### User:\none\n\n### Assistant:\ntwo</s>\n\n"
        "### User:\nthree\n\n### Assistant:\nfour</s>"
    )
    assert _learnt(data, tokenizer) == "two</s>four</s>"


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.CHATML_WITH_GENERATION])
def test_chat_template_learns_answers_and_the_ends_of_their_turns(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    conversation = _chat("one", "two", "two", "four")
    data = _one(conversation, tokenizer)
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    expected = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert data.corpus.token_ids.tolist() == expected
    assert _learnt(data, tokenizer) == "two<|im_end|>four<|im_end|>"


def test_generation_blocks_agree_with_transformers_mask() -> None:
    template = tiny.CHATML_WITH_GENERATION.replace(
        "{{ m['content'] }}{% endgeneration %}", "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    )
    tokenizer = tiny_tokenizer(template)
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me, naïve 🙂"}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    data = _one(_chat("who?", "me, naïve 🙂"), tokenizer)
    assert data.corpus.is_supervised.tolist() == [bool(mark) for mark in encoded["assistant_masks"]]


def test_template_that_lays_out_earlier_turns_otherwise() -> None:
    tokenizer = tiny_tokenizer(tiny.THINKING)
    data = _one(_chat("one", "t", "three", "four"), tokenizer)
    assert _learnt(data, tokenizer) == "t<|im_end|><think>\n\n</think>\n\nfour<|im_end|>"
    assert data.tally.count(Event.TURN_REWRITTEN) == 0


def test_rewritten_turns_are_not_learnt_and_counted() -> None:
    tokenizer = tiny_tokenizer(tiny.THINKING)
    data = _one(_chat("one", "<think>hm</think>two", "three", "four"), tokenizer)
    assert "two" not in _learnt(data, tokenizer)
    assert "four<|im_end|>" in _learnt(data, tokenizer)
    assert data.tally.count(Event.TURN_REWRITTEN) == 1


def test_template_without_generation_prompt_and_with_its_own_bos() -> None:
    tokenizer = tiny_tokenizer(tiny.INSTRUCT)
    data = _one(_chat("one", "two", "three", "four"), tokenizer)
    assert _text(data, tokenizer) == "<s>[INST] one [/INST] two</s>[INST] three [/INST] four</s>"
    assert _learnt(data, tokenizer) == " two</s> four</s>"


def test_template_that_refuses_a_role_is_told() -> None:
    with pytest.raises(InputError, match=r"chat\.jsonl:1: .*Only user and assistant.*system, user, assistant"):
        _one(_chat("one", "two", system="s"), tiny_tokenizer(tiny.INSTRUCT))


def test_template_that_drops_a_role_is_counted() -> None:
    data = _one(_chat("one", "two", system="be kind"), tiny_tokenizer(tiny.DROPS_SYSTEM))
    assert data.tally.count(Event.CONTENT_DROPPED) == 1
    data = _one(_chat("one", "two"), tiny_tokenizer(tiny.DROPS_SYSTEM))
    assert data.tally.count(Event.CONTENT_DROPPED) == 0


def test_template_without_assistant_heading_learns_no_heading() -> None:
    tokenizer = tiny_tokenizer(tiny.DROPS_SYSTEM)
    assert _learnt(_one(_chat("one", "two"), tokenizer), tokenizer) == "two<|im_end|>"


def test_eos_is_added_where_the_template_ends_nothing() -> None:
    tokenizer = tiny_tokenizer(tiny.ENDLESS)
    data = _one(_chat("one", "two"), tokenizer)
    assert _text(data, tokenizer) == "user: one\nassistant: two</s>"
    assert _learnt(data, tokenizer).strip() == "two</s>"
    assert data.tally.count(Event.END_ADDED) == 1


def test_unsupervised_turns_are_respected() -> None:
    messages = (
        Message("user", "a"),
        Message("assistant", "b", False),
        Message("user", "c"),
        Message("assistant", "d", True),
    )
    for template in (tiny.CHATML, tiny.CHATML_WITH_GENERATION):
        tokenizer = tiny_tokenizer(template)
        assert _learnt(_one(Conversation(messages, "x"), tokenizer), tokenizer) == "d<|im_end|>"


def test_tools_reach_a_template_that_knows_none() -> None:
    conversation = Conversation(_chat("one", "two").messages, "x", tools=({"name": "look_up"},))
    for tokenizer in (tiny_tokenizer(tiny.CHATML), tiny_tokenizer()):
        assert "look_up" in _text(_one(conversation, tokenizer), tokenizer)


def test_structured_tool_calls_reach_a_template_that_knows_them() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.arguments.x }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + tiny.GENERATION_PROMPT
    )
    call = {"function": {"name": "f", "arguments": '{"x": "north"}'}}
    messages = (Message("user", "where"), Message("assistant", "", True, {"tool_calls": [call]}))
    tokenizer = tiny_tokenizer(template)
    assert _learnt(_one(Conversation(messages, "x"), tokenizer), tokenizer) == "<call>north<|im_end|>"
    plain = tiny_tokenizer(tiny.CHATML)
    assert '"name": "f"' in _learnt(_one(Conversation(messages, "x"), plain), plain)


def test_a_token_across_the_boundary_is_not_learnt_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer(" answer", add_special_tokens=False).input_ids) == 1
    data = _one(_completion("The ans", "wer"), tokenizer)
    assert _learnt(data, tokenizer) == "</s>"
    assert data.tally.count(Event.STRADDLING) == data.tally.count(Event.RUN_TOGETHER) == 1


def test_a_blank_at_the_end_of_the_prompt_joins_the_first_word() -> None:
    tokenizer = tiny_tokenizer()
    data = _one(_completion("What is the ", "answer"), tokenizer)
    assert _learnt(data, tokenizer) == " answer</s>"
    assert (data.tally.count(Event.BLANK_JOINED), data.tally.count(Event.STRADDLING)) == (1, 0)


def test_a_lone_surrogate_is_told() -> None:
    with pytest.raises(InputError, match=r"pair\.jsonl:1: .*'\\ud800'"):
        _one(_completion("a", "b\ud800"), tiny_tokenizer())


def test_the_date_does_not_change_the_data() -> None:
    template = "{% if not date_string is defined %}{% set date_string = strftime_now('%c') %}{% endif %}"
    tokenizer = tiny_tokenizer(template + "{{ date_string + '\n' }}" + tiny.CHATML)
    assert _text(_one(_chat("a", "b"), tokenizer), tokenizer).startswith("26 Jul 2024\n")


def test_texts_and_other_objectives_learn_everything() -> None:
    tokenizer = tiny_tokenizer()
    for data in (
        _one(PlainText("once", "x"), tokenizer),
        _one(PlainText("once", "x"), tokenizer, objective="pretrain"),
        _one(_completion("on", "ce"), tokenizer, objective="continue"),
    ):
        assert _text(data, tokenizer) == "<s>once</s>"
        assert data.corpus.is_supervised.tolist() == [False] + [True] * (len(data.corpus.token_ids) - 1)


def test_too_long() -> None:
    tokenizer = tiny_tokenizer()
    document = _completion("a b\n", "c d e f g h i j k")
    whole = _one(document, tokenizer)
    length = len(whole.corpus.token_ids)
    cut = _one(document, tokenizer, max_length=length - 3)
    assert cut.corpus.token_ids.tolist() == whole.corpus.token_ids[: length - 3].tolist()
    assert (cut.num_tokens_cut, cut.tally.count(Event.CUT)) == (3, 1)
    gone = _one(document, tokenizer, max_length=3)
    assert (len(gone.corpus), gone.num_tokens_cut) == (0, length)
    assert gone.tally.count(Event.ANSWER_CUT_AWAY) == 1
    dropped = _one(document, tokenizer, max_length=length - 3, too_long="drop")
    assert (len(dropped.corpus), dropped.num_tokens_cut) == (0, length)
    assert dropped.tally.count(Event.DROPPED_TOO_LONG) == 1
    with pytest.raises(InputError, match=rf"pair\.jsonl:1: {length} tokens .*max_length"):
        _one(document, tokenizer, max_length=length - 3, too_long="error")
    with pytest.raises(InputError, match="split is for plain texts"):
        _one(document, tokenizer, max_length=5, too_long="split")


@settings(max_examples=50, deadline=None)
@given(num_letters=st.integers(1, 60), max_length=st.integers(2, 20))
def test_windows_learn_every_token_once(num_letters: int, max_length: int) -> None:
    text = PlainText("abcdefghij"[: num_letters % 10] * (num_letters // 5 + 1) + "z", "x")
    whole = _one(text, tiny_tokenizer(), objective="pretrain")
    split = _one(text, tiny_tokenizer(), objective="pretrain", max_length=max_length, too_long="split")
    assert split.corpus.lengths.max() <= max_length
    assert split.corpus.token_ids[split.corpus.is_supervised].tolist() == whole.corpus.token_ids[1:].tolist()
    assert split.num_tokens_cut == 0


def test_empty_and_unlearnt_records_are_counted() -> None:
    documents: list[Document] = [
        PlainText("  \n", "a:1"),
        _completion("p", " "),
        Conversation((Message("user", "u"),), "a:3"),
        Conversation((), "a:4"),
        _completion("p\n", "answer"),
    ]
    data = tokenize(documents, tiny_tokenizer(), max_length=100)
    assert (len(data.corpus), data.num_records, data.tally.count(Event.EMPTY)) == (1, 5, 4)
    assert data.tally.origins(Event.EMPTY) == ("a:1", "pair.jsonl:1", "a:3", "a:4")
    assert data.record_numbers.tolist() == [4]


def test_no_eos_is_told() -> None:
    with pytest.raises(InputError, match="no EOS token"):
        _one(_completion("a", "b"), tiny_tokenizer(eos=None))


def test_chunks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [_completion(f"{i}\n", f"answer {i}") for i in range(10)]
    at_once = tokenize(documents, tiny_tokenizer(), max_length=100)
    monkeypatch.setattr("tunewise.workload.tokens._CHUNK_DOCUMENTS", 3)
    assert tokenize(iter(documents), tiny_tokenizer(), max_length=100).corpus.fingerprint == at_once.corpus.fingerprint


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: text.strip())
WITHOUT_BORDER_BLANKS = TEXTS.map(str.strip)


@settings(max_examples=100, deadline=None)
@given(prompt=TEXTS, answer=TEXTS)
def test_what_is_learnt_is_the_end_of_answer_and_eos(prompt: str, answer: str) -> None:
    tokenizer = tiny_tokenizer()
    data = _one(_completion(prompt, answer), tokenizer)
    assert _text(data, tokenizer) == f"<s>{prompt}{answer}</s>"
    learnt = _learnt(data, tokenizer)
    if data.tally.count(Event.STRADDLING):
        assert learnt.endswith("</s>")
        assert len(learnt) < len(f"{answer}</s>")
    else:
        assert learnt.endswith(f"{answer}</s>")
        assert learnt.removesuffix(f"{answer}</s>").strip() == ""


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(WITHOUT_BORDER_BLANKS, min_size=2, max_size=6))
@pytest.mark.parametrize("template", [tiny.CHATML, tiny.CHATML_WITH_GENERATION, None])
def test_in_chats_exactly_answers_and_ends_are_learnt(template: str | None, turns: list[str]) -> None:
    tokenizer = tiny_tokenizer(template)
    data = _one(_chat(*turns), tokenizer)
    end = "<|im_end|>" if template else "</s>"
    start = "" if template else "\n"
    learnt = "".join(answer + end for answer in turns[1::2])
    assert data.tally.count(Event.STRADDLING) == 0, start
    assert _learnt(data, tokenizer) == learnt
    ids, marks = data.corpus.document(0)
    assert np.count_nonzero(ids[marks] == (TURN_END if template else EOS)) == len(turns) // 2
