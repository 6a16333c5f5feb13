"""Reading records, and the complaint about everything that can be wrong with a file."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tunewise.errors import InputError, MissingBackend
from tunewise.workload.records import read_records

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def _write(path: Path, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "third_origin"),
    [
        ("a.jsonl", LINES, "a.jsonl:3"),
        ("a.jsonl.gz", LINES, "a.jsonl.gz:3"),
        ("a.json", json.dumps(ROWS), "a.json[2]"),
        ("a.json", json.dumps(ROWS, indent=2), "a.json[2]"),
        ("a.json", json.dumps({"version": 1, "rows": ROWS}), "a.json rows[2]"),
        ("a.json", LINES, "a.json:3"),
        ("a.json.gz", json.dumps(ROWS), "a.json.gz[2]"),
        ("a.jsonl", "\ufeff" + LINES, "a.jsonl:3"),
        (
            "a.csv",
            "prompt,completion\n" + "".join(f"question {i},answer {i}\n" for i in range(5)),
            "a.csv row 3",
        ),
        (
            "a.tsv",
            "prompt\tcompletion\n" + "".join(f"question {i}\tanswer {i}\n" for i in range(5)),
            "a.tsv row 3",
        ),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str, content: str, third_origin: str) -> None:
    records = list(read_records(_write(tmp_path / name, content)))
    assert [record.fields for record in records] == ROWS
    assert records[2].origin == third_origin


def test_parquet(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    records = list(read_records(str(tmp_path / "a.parquet")))
    assert [record.fields for record in records] == ROWS
    assert records[0].origin == "a.parquet row 1"


def test_csv_fields_may_hold_line_ends_and_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000
    records = list(read_records(_write(tmp_path / "a.csv", f'text\n"one\ntwo"\n{long}\n')))
    assert [record.fields["text"] for record in records] == ["one\ntwo", long]


def test_text_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    _write(tmp_path / "b.txt", "second")
    _write(tmp_path / "a.md", "first")
    _write(tmp_path / "sub" / "c.txt.gz", "third")
    records = list(read_records(str(tmp_path)))
    assert [(record.fields["text"], record.origin) for record in records] == [
        ("first", "a.md"),
        ("second", "b.txt"),
        ("third", "sub/c.txt.gz"),
    ]


def test_reading_is_lazy_and_stops_at_max_records(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", LINES + "this line is broken\n")
    assert len(list(read_records(source, max_records=5))) == 5


def _truncated(data: bytes) -> bytes:
    return gzip.compress(data * 1000)[:-100]


BAD_FILES: list[tuple[str, Callable[[Path], object], list[str]]] = [
    (
        "a.jsonl",
        lambda p: p.write_text(LINES + '{"prompt": "x\n'),
        ["a.jsonl:6", "column 12", "Unterminated string"],
    ),
    ("a.jsonl", lambda p: p.write_text('{"a": 1}\n[1, 2]\n'), ["a.jsonl:2", "JSON object", "an array"]),
    ("a.jsonl", lambda p: p.write_text(json.dumps(ROWS)), ["a.jsonl:1", ".json"]),
    (
        "a.jsonl",
        lambda p: p.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n'),
        ["a.jsonl:2", "0xe9", "offset 16", "UTF-8"],
    ),
    ("a.json", lambda p: p.write_bytes(b'[{"a":\n"\xe9"}]'), ["a.json:2", "0xe9", "offset 8", "UTF-8"]),
    ("a.jsonl", lambda p: p.write_bytes(b""), ["a.jsonl", "empty"]),
    ("a.jsonl", lambda p: p.write_text("\n \n"), ["only blank lines"]),
    ("a.txt", lambda p: p.write_text(" \n"), ["only blank lines"]),
    ("a.json", lambda p: p.write_text("[]"), ["array is empty"]),
    ("a.json", lambda p: p.write_text('[{"a": 1}, {"a": 2]'), ["a.json[1]", "line 1", "column 19"]),
    ("a.json", lambda p: p.write_text('[{"a": 1} {"a": 2}]'), ["a.json[0]", "','"]),
    ("a.json", lambda p: p.write_text('[{"a": 1}, 7]'), ["a.json[1]", "a number"]),
    ("a.json", lambda p: p.write_text('{"a": [1], "b": [2]}'), ["exactly one list", "a, b"]),
    ("a.csv", lambda p: p.write_text("a,b\n1,2\n3\n"), ["row 2", "line 3", "1 columns", "has 2"]),
    ("a.csv", lambda p: p.write_text("a,a\n1,2\n"), ["'a' twice"]),
    ("a.csv", lambda p: p.write_text("a;b\n1;2\n"), ["';'"]),
    ("a.csv", lambda p: p.write_text("a,b\n"), ["no rows"]),
    ("a.csv", lambda p: p.write_text('a,b\n"1,2\n'), ["not CSV", "line"]),
    ("a.parquet", lambda p: p.write_text("no parquet at all"), ["not a readable Parquet"]),
    ("a.jsonl", lambda p: p.write_bytes(b"PAR1...."), ["is a Parquet file", ".parquet"]),
    ("a.jsonl.gz", lambda p: p.write_bytes(_truncated(LINES.encode())), ["damaged or cut off", "after line"]),
    ("a.jsonl.gz", lambda p: p.write_text(LINES), ["not gzip-compressed"]),
    ("a.jsonl", lambda p: p.write_bytes(gzip.compress(LINES.encode())), ["a.jsonl.gz"]),
    ("a.xlsx", lambda p: p.write_text("x"), ["'.xlsx'", ".jsonl", ".parquet"]),
    ("folder", lambda p: p.mkdir(), ["no data files"]),
]


@pytest.mark.parametrize(("name", "make", "expected"), BAD_FILES)
def test_bad_files_are_named_with_their_place(
    tmp_path: Path, name: str, make: Callable[[Path], object], expected: list[str]
) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError) as caught:
        list(read_records(str(tmp_path / name)))
    for part in expected:
        assert part in str(caught.value)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", LINES)
    with pytest.raises(InputError, match=r"Did you mean '.*train\.jsonl'"):
        read_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(InputError, match="no such file, nor the folder"):
        read_records(str(tmp_path / "nowhere" / "at" / "train.jsonl"))


def test_folder_of_mixed_kinds(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", LINES)
    _write(tmp_path / "b.csv", "a\n1\n")
    with pytest.raises(InputError, match="mixes"):
        list(read_records(str(tmp_path)))


def test_missing_libraries_give_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingBackend, match=r"tunewise\[parquet\]"):
        list(read_records(str(tmp_path / "a.parquet")))
    with pytest.raises(MissingBackend, match=r"tunewise\[hub\]"):
        list(read_records("someone/some-data-set"))
