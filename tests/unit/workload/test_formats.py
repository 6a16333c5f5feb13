"""Which fields become what, and the normal form of each format."""

from __future__ import annotations

from typing import Any

import pytest

from tunewise.errors import InputError
from tunewise.workload.conversation import Conversation, Document, Message, PlainText
from tunewise.workload.detection import find_mapping
from tunewise.workload.record import Record


def _record(fields: dict[str, Any]) -> Record:
    return Record(fields, "train.jsonl:17")


def _convert(fields: dict[str, Any], **named: str) -> Document:
    return find_mapping([_record(fields)], "auto", named).convert(_record(fields))


def _turns(document: Document) -> list[tuple[str, str, bool]]:
    assert isinstance(document, Conversation)
    return [(message.role, message.content, message.is_supervised) for message in document.messages]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"id": 7, "instruction": "i", "input": "x", "response": "r"},
            "format alpaca: instruction <- 'instruction', input <- 'input', output <- 'response'; ignored: 'id'",
        ),
        (
            {"question": "q", "answer": "a"},
            "format prompt-completion: prompt <- 'question', completion <- 'answer'",
        ),
        (
            {"Query": "q", "Answer": "a"},
            "format prompt-completion: prompt <- 'Query', completion <- 'Answer'",
        ),
        ({"mr": "m", "ref": "r"}, "format prompt-completion: prompt <- 'mr', completion <- 'ref'"),
        ({"messages": [{"role": "user", "content": "u"}]}, "format messages: messages <- 'messages'"),
        (
            {"conversations": [{"role": "user", "content": "u"}]},
            "format messages: messages <- 'conversations'",
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}], "tools": "[]", "system": "s"},
            "format sharegpt: conversations <- 'conversations', tools <- 'tools', system <- 'system'",
        ),
        ({"story": "once"}, "format text: text <- 'story'"),
        (
            {"instruction": "i", "instances": [{"input": "x", "output": "y"}]},
            "format alpaca: instruction <- 'instruction', input <- 'instances.0.input', output <- 'instances.0.output'",
        ),
    ],
)
def test_formats_are_found_and_said(fields: dict[str, Any], said: str) -> None:
    assert find_mapping([_record(fields)]).describe() == said


def test_ambiguity_is_resolved_and_said() -> None:
    mapping = find_mapping([_record({"text": "t", "code": "c"})])
    assert mapping.format == "prompt-completion"
    assert "also possible: format text: text <- 'text'" in mapping.describe()
    assert find_mapping([_record({"text": "t", "code": "c"})], "text").describe().startswith("format text")


def test_alpaca() -> None:
    document = _convert({"instruction": "Add.", "input": "2 3", "output": "5"})
    assert _turns(document) == [("user", "Add.\n\n2 3", False), ("assistant", "5", True)]
    assert isinstance(document, Conversation)
    assert document.plain_prompt is not None
    assert document.plain_prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n")
    without = _convert({"instruction": "Add {x}.", "input": float("nan"), "output": 5})
    assert _turns(without) == [("user", "Add {x}.", False), ("assistant", "5", True)]
    assert isinstance(without, Conversation)
    assert without.plain_prompt is not None
    assert "### Input" not in without.plain_prompt


def test_named_fields_and_paths() -> None:
    fields = {"q": "who", "answers": ["me", "you"]}
    assert _turns(_convert(fields, prompt="q", completion="answers.1")) == [
        ("user", "who", False),
        ("assistant", "you", True),
    ]


def test_messages_with_weights_parts_and_tool_calls() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    document = _convert(
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "r", "tool_call_id": "1"},
                {"role": "assistant", "content": "old", "weight": 0},
                {"role": "assistant", "content": "new", "weight": 1},
            ]
        }
    )
    assert _turns(document) == [
        ("system", "s", False),
        ("user", "ab", False),
        ("assistant", "", True),
        ("tool", "r", False),
        ("assistant", "old", False),
        ("assistant", "new", True),
    ]
    assert isinstance(document, Conversation)
    assert document.messages[2].extra == {"tool_calls": [call]}
    assert document.messages[3].extra == {"tool_call_id": "1"}


def test_sharegpt_roles_system_and_tools() -> None:
    document = _convert(
        {
            "system": "be kind",
            "tools": '[{"name": "f"}]',
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "a"},
            ],
        }
    )
    assert isinstance(document, Conversation)
    assert [message.role for message in document.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert document.messages[2].is_supervised
    assert document.messages[2].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert document.tools == ({"name": "f"},)


def test_text() -> None:
    assert _convert({"text": "t"}) == PlainText("t", "train.jsonl:17")


@pytest.mark.parametrize(
    ("fields", "named", "expected"),
    [
        (
            {"a": "x", "bb": "long"},
            {},
            ["'a', 'bb'", "fields: {prompt: a, completion: bb}", "train.jsonl:17"],
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, {}, ["preference records"]),
        ({"question": "q", "answer": ["a"]}, {}, ["answer: must be text, not list", "answer.0"]),
        (
            {"messages": [{"role": "alien", "content": "x"}]},
            {},
            ["messages[0]", "unknown role 'alien'", "assistant"],
        ),
        ({"messages": [{"role": "user"}]}, {}, ["messages[0]", "needs 'role' and 'content'"]),
        ({"messages": [{"role": "user", "content": [{"image": 1}]}]}, {}, ["only text can be learnt"]),
        ({"prompt": "p", "completion": "c"}, {"promt": "p"}, ["no field 'promt'", "Did you mean 'prompt'"]),
        (
            {"question": "p", "c": "c"},
            {"prompt": "questoin"},
            ["no field 'questoin'", "Did you mean 'question'"],
        ),
        ({"a": "p", "b": "c"}, {"prompt": "a", "output": "b"}, ["no format has all of 'prompt', 'output'"]),
        ({"messages": "no list"}, {"messages": "messages"}, ["must be a list of messages"]),
    ],
)
def test_bad_fields_are_told_with_what_to_do(
    fields: dict[str, Any], named: dict[str, str], expected: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        _convert(fields, **named)
    for part in expected:
        assert part in str(caught.value)


def test_a_later_record_without_the_field_is_named() -> None:
    mapping = find_mapping([_record({"question": "q", "answer": "a"})])
    with pytest.raises(InputError, match=r"train\.jsonl:99: no field 'answer'.*'question', 'respons'"):
        mapping.convert(Record({"question": "q", "respons": "a"}, "train.jsonl:99"))


def test_keys_ignore_case_and_blanks_and_see_the_prompt() -> None:
    def make(prompt: str, answer: str) -> Conversation:
        return Conversation((Message("user", prompt), Message("assistant", answer, True)), "x")

    assert make("Who  is\nit", "me").content_key == make("who is it ", "ME").content_key
    assert make("who", "me").content_key != make("who", "you").content_key
    assert make("who", "me").prompt_key == make("Who", "you").prompt_key
    assert make("", "me").prompt_key != make("", "you").prompt_key
