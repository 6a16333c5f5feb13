"""Bad data: files that are not what they seem, records that are not what they should be, nothing left to learn."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

from benchmarks.faults.cases.case import Case, also, bound, offline, setting, train, without, write

PAIR = {"prompt": "Say it:", "completion": " it"}


def _pairs(count: int = 30) -> list[object]:
    return [{"prompt": f"Question {number}: say it.\n", "completion": f"It is {number}."} for number in range(count)]


def _chat(*turns: tuple[str, object]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _file(name: str, content: str | bytes | list[object], what: str, *says: str, options: tuple[str, ...] = ()) -> Case:
    return Case(f"data: {what}", train(*options, data=name), (name, *says), write(name, content))


def _records(what: str, records: list[object], *says: str, settings: tuple[str, ...] = ()) -> Case:
    options = tuple(word for text in settings for word in ("--set", text))
    return Case(f"data: {what}", train(*options, data="bad.jsonl"), says, write("bad.jsonl", records))


def _unreadable(folder: Path) -> None:
    write("secret.jsonl", _pairs())(folder)
    os.chmod(folder / "secret.jsonl", 0)


_LINES = "".join(json.dumps(pair) + "\n" for pair in _pairs())

FILES = (
    Case(
        "data: the file is not there",
        train(data="dta.jsonl"),
        ("dta.jsonl", "no such file", "Did you mean 'data.jsonl'?"),
    ),
    Case("data: the folder is not there", train(data="nowhere/data.jsonl"), ("nowhere/data.jsonl", "no such file")),
    Case(
        "data: a folder without texts",
        train(data="pictures"),
        ("pictures: no data files", "Known endings: .jsonl"),
        write("pictures/cat.png", b"\x89PNG"),
    ),
    Case(
        "data: a folder that mixes kinds of files",
        train(data="texts"),
        ("texts: the folder mixes kinds of files (.csv, text)", "Name one file"),
        also(write("texts/a.txt", "Some text."), write("texts/b.csv", "a,b\n1,2\n")),
    ),
    _file("data.xyz", _LINES, "an unknown ending", "cannot read files that end in '.xyz'", "Known: .jsonl"),
    _file("empty.jsonl", "", "an empty file", "the file is empty"),
    _file("blank.jsonl", "\n \n\n", "only blank lines", "only blank lines"),
    _file(
        "bad.jsonl",
        _LINES.replace('{"prompt": "Question 2:', '{"prompt: "Question 2:'),
        "broken JSON on a line",
        "bad.jsonl:3, column",
        "the line is not JSON",
    ),
    _file("bad.jsonl", _LINES[:-20], "the last line is cut off", "bad.jsonl:30, column", "Unterminated string"),
    _file(
        "bad.jsonl", _LINES + "17\n", "a line that is a number", "bad.jsonl:31", "must be a JSON object", "not a number"
    ),
    _file(
        "bad.jsonl",
        _LINES + '{"prompt": "a", "completion": "b", "completion": "c"}\n',
        "a field twice in one record",
        "bad.jsonl:31",
        "the field 'completion' twice",
        "Keep one",
    ),
    _file("bad.jsonl", "[" * 100_000 + "\n", "JSON nested without end", "bad.jsonl:1", "nested too deeply"),
    _file("bad.json", "[1, 2, 3]", "an array of numbers", "bad.json[0]", "must be a JSON object", "not a number"),
    _file("bad.json", json.dumps(_pairs())[:-9], "a JSON array that is cut off", "bad.json[29]: not JSON at line 1"),
    _file(
        "bad.json", json.dumps({"a": [1], "b": [2]}), "a JSON object with two lists", "exactly one list", "lists: a, b"
    ),
    _file(
        "bad.jsonl",
        _LINES.encode() + '{"prompt": "é", "completion": "ü"}'.encode("latin-1"),
        "not UTF-8",
        "bad.jsonl:31: byte 0xe9",
        "is not UTF-8",
        "iconv",
    ),
    _file("bad.jsonl", _LINES.encode("utf-16"), "UTF-16", "bad.jsonl:1: byte 0xff", "is not UTF-8"),
    _file(
        "bad.jsonl", '{"prompt": "a", "completion": "\\ud83d"}\n', "half a surrogate pair", "bad.jsonl:1", "surrogate"
    ),
    _file(
        "bad.jsonl.gz",
        gzip.compress(_LINES.encode(), mtime=0)[:-30],
        "a .gz that is cut off",
        "gzip data are damaged or cut off",
        "Get the file again",
    ),
    _file("bad.jsonl.gz", _LINES, "a .gz that is none", "is not gzip-compressed", "Rename it"),
    _file("bad.jsonl", gzip.compress(_LINES.encode(), mtime=0), "gzip without .gz", "Rename it to bad.jsonl.gz"),
    _file(
        "bad.csv",
        "prompt,completion\na,b\nc,d,e\n",
        "a CSV row with too many columns",
        "row 2 (line 3) has 3 columns, the header has 2",
        "Quote fields",
    ),
    _file("bad.csv", "prompt;completion\na;b\n", "a CSV with semicolons", "line 1", "separated by ';'"),
    _file("bad.csv", "prompt,prompt\na,b\n", "a CSV column twice", "line 1: the header has the column 'prompt' twice"),
    _file("bad.csv", "prompt,completion\n", "a CSV with nothing but its header", "no rows after its header"),
    _file("bad.csv", 'prompt,completion\n"a,b\n', "a CSV quote that never ends", "not CSV: unexpected end of data"),
    _file("bad.parquet", b"PAR1" + bytes(100), "a broken Parquet file", "not a readable Parquet file"),
    Case(
        "data: Parquet without pyarrow",
        train(data="bad.parquet"),
        ("bad.parquet", "'pyarrow', which is not installed", "pip install 'tunewise[parquet]'"),
        write("bad.parquet", b"PAR1" + bytes(100)),
        around=without("pyarrow"),
    ),
    Case(
        "data: a file that may not be read",
        train(data="secret.jsonl"),
        ("secret.jsonl", "cannot be read", "Permission denied"),
        _unreadable,
        around=bound,
    ),
    Case(
        "data: a hub data set without network",
        train(data="somebody/some-data"),
        ("'somebody/some-data' is no path here", "as a hub data set"),
        around=offline,
    ),
    Case(
        "data: a hub data set without the library 'datasets'",
        train(data="somebody/some-data"),
        ("'somebody/some-data'", "'datasets', which is not installed", "pip install 'tunewise[hub]'"),
        around=without("datasets"),
    ),
)

RECORDS = (
    _records(
        "fields of no known format",
        [{"a": "x", "b": "yyy"}],
        "bad.jsonl:1",
        "'a', 'b' do not fit any known format",
        "fields: {prompt: a, completion: b}",
    ),
    _records(
        "a named field that is not there",
        _pairs(),
        "data.fields: there is no field 'prmpt'",
        "Did you mean 'prompt'?",
        settings=("data.fields={prompt: prmpt, completion: completion}",),
    ),
    _records(
        "a name for a field that no format has",
        _pairs(),
        "no field 'promt'",
        "Did you mean 'prompt'?",
        settings=("data.fields={promt: prompt}",),
    ),
    _records("the wrong format named", _pairs(), "do not fit the format messages", settings=("data.format=messages",)),
    _records(
        "preference records",
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        "preference records",
        "completion: chosen",
    ),
    _records(
        "a record of another format",
        [*_pairs(120), {"instruction": "a", "output": "b"}],
        "bad.jsonl:121",
        "no field 'prompt'",
        "This record has: 'instruction', 'output'",
    ),
    _records(
        "every answer empty",
        [{"prompt": "a", "completion": "  "}] * 9,
        "empty answer",
        "Nothing is left to learn",
        "bad.jsonl:1",
    ),
    _records(
        "every answer null", [{"prompt": "a", "completion": None}] * 9, "empty answer", "Nothing is left to learn"
    ),
    _records(
        "an array where text is expected",
        [{"prompt": "a", "completion": ["b"]}],
        "bad.jsonl:1 completion",
        "must be text, not list",
        "completion.0",
    ),
    _records(
        "an unknown role",
        [_chat(("user", "a"), ("asistant", "b"))],
        "bad.jsonl:1 messages[1]",
        "unknown role 'asistant'",
    ),
    _records(
        "messages that are text",
        [_chat(("user", "a"), ("assistant", "b")), {"messages": "hello"}],
        "bad.jsonl:2 messages",
        "must be a list of messages",
    ),
    _records(
        "a message without content",
        [{"messages": [{"role": "user"}]}],
        "bad.jsonl:1 messages[0]",
        "needs 'role' and 'content'",
    ),
    _records(
        "a number as content",
        [_chat(("user", "a"), ("assistant", 5))],
        "bad.jsonl:1 messages[1]",
        "the content must be text",
    ),
    _records(
        "a picture in a message",
        [_chat(("user", [{"type": "image", "url": "x"}]), ("assistant", "b"))],
        "bad.jsonl:1 messages[0]",
        "only text can be learnt",
    ),
    _records("conversations without assistant", [_chat(("user", "a"))] * 9, "bad.jsonl:1", "Nothing is left to learn"),
    Case(
        "data: a conversation without user, which the chat template refuses",
        setting("data.source=bad.jsonl", "model.chat_template=template.jinja"),
        ("bad.jsonl:1", "chat template refuses this conversation", "a user must begin", "Its roles are: assistant"),
        also(
            write("bad.jsonl", [_chat(("assistant", "b"))]),
            write(
                "template.jinja",
                "{% if messages[0].role != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}"
                "{% for message in messages %}{{ message.content }}<|end|>{% endfor %}",
            ),
        ),
    ),
    _records(
        "a record too long, and too_long: error",
        [{"prompt": "a ", "completion": "word " * 90}],
        "bad.jsonl:1",
        "more than max_length (64)",
        "too_long: cut",
        settings=("data.too_long=error", "data.max_length=64"),
    ),
    _records(
        "every record too long, and too_long: drop",
        [{"prompt": "a ", "completion": "word " * 90}] * 9,
        "tokens cut or dropped (100.0% of all)",
        "Nothing is left to learn",
        settings=("data.too_long=drop", "data.max_length=64"),
    ),
    _records(
        "prompts longer than max_length",
        [{"prompt": "word " * 90, "completion": "b"}] * 9,
        "behind max_length",
        "greater data.max_length",
        settings=("data.max_length=64",),
    ),
    _records(
        "max_length beyond the model's context",
        _pairs(),
        "data.max_length: 4096",
        "context of 128",
        settings=("data.max_length=4096",),
    ),
    _records(
        "windows of conversations", _pairs(), "too_long: split is for plain texts", settings=("data.too_long=split",)
    ),
    _records(
        "a system prompt for plain texts",
        [{"text": "Some text."}] * 9,
        "data.system_prompt",
        "plain texts",
        settings=("data.system_prompt=Be good.",),
    ),
    _records(
        "a single record, so none to set aside",
        _pairs(1),
        "too few to set some aside for validation",
        "data.validation_fraction: 0",
    ),
    _records(
        "a share for validation that leaves nothing to train on",
        _pairs(2),
        "data.validation_fraction",
        settings=("data.validation_fraction=1.0",),
    ),
    Case(
        "data: the validation file is the training file",
        setting("data.validation=data.jsonl"),
        ("validation documents whose content is in the training data", "Remove them from one side"),
    ),
    Case(
        "data: the validation file is not there",
        setting("data.validation=valid.jsonl"),
        ("valid.jsonl", "no such file"),
    ),
    Case(
        "data: doctor refuses what train refuses",
        ("doctor", "bad.jsonl", "--model", "model"),
        ("bad.jsonl:2, column", "the line is not JSON"),
        write("bad.jsonl", json.dumps(PAIR) + "\n{]\n"),
    ),
)

CASES = (*FILES, *RECORDS)
