"""The embedded data set: big enough, deterministic, and no file on two sides."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from pathlib import Path
from typing import Literal

import pytest

from tunewise.workload import stdlib_source
from tunewise.workload.stdlib_source import bucket_of, stdlib_records, stdlib_texts


def test_counts() -> None:
    assert len(list(stdlib_records("train"))) > 800
    assert len(list(stdlib_records("validation"))) > 100
    assert sum(len(record.fields["text"]) for record in stdlib_texts("train")) > 2_000_000
    assert len(list(stdlib_texts("validation"))) > 20


@pytest.mark.parametrize("part", ["train", "validation"])
def test_prompt_and_completion_are_a_function(part: Literal["train", "validation"]) -> None:
    for record in stdlib_records(part):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (function,) = ast.parse(record.fields["prompt"] + record.fields["completion"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function)
        assert record.fields["prompt"].endswith("\n")
        assert len(record.fields["completion"].splitlines()) in stdlib_source.BODY_LINES


def test_deterministic_order() -> None:
    first = [(record.origin, record.fields) for record in stdlib_records("validation")]
    assert first == [(record.origin, record.fields) for record in stdlib_records("validation")]


def test_no_file_is_on_two_sides() -> None:
    files = [
        {record.origin.split(":")[0] for record in records}
        for records in (stdlib_records("train"), stdlib_texts("train"), stdlib_texts("validation"))
    ]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]
    assert {record.origin.split(":")[0] for record in stdlib_records("validation")} <= files[2]


def test_buckets_are_stable() -> None:
    assert [bucket_of(name) for name in ("json/decoder.py", "ast.py", "shutil.py")] == [3, 6, 1]


def test_installed_packages_change_no_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for number in range(40):
        (tmp_path / f"module_{number}.py").write_text(f"number = {number}\n")
    before = [record.fields["text"] for record in stdlib_texts("train", seed=3)]
    inside = tmp_path / "site-packages" / "package"
    inside.mkdir(parents=True)
    for number in range(20):
        (inside / f"part_{number}.py").write_text("x = 1\n")
    assert [record.fields["text"] for record in stdlib_texts("train", seed=3)] == before
    assert len(before) > 10
