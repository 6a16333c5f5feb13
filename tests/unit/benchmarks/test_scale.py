"""benchmarks/scale/run.py keeps its rows, goes on where it stopped, and sums up what it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks.scale import run


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Rows that were run, made up instead of measured."""
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path / "cache"))
    rows: list[dict[str, Any]] = []

    def made_up(row: dict[str, Any], cache: Path) -> dict[str, Any]:
        rows.append(row)
        if row["kind"] == "kernels":
            return {"failed": "no compiler", "code": 1} if row["size"] == "4M" else {"speedup": 1.0 + len(rows)}
        return {"tokens_per_second": 100.0 * len(rows), "seconds": 2.5, "anonymous_bytes": 7}

    monkeypatch.setattr(run, "run_row", made_up)
    return rows


def call(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = run.main(["--json", str(out), *options])
    return code, json.loads(out.read_text())


def test_it_goes_on_where_it_stopped(done: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, content = call(out, "--only", "length,model", "--seconds", "-1")
    assert (code, content["summary"]["to_come"], done) == (run.UNFINISHED, 10, [])
    code, content = call(out, "--only", "length")
    assert (code, len(done), content["summary"]["to_come"]) == (0, 6, 0)
    code, content = call(out, "--only", "length,model")
    assert (code, len(done)) == (0, 10)
    assert call(out, "--only", "length,model")[1]["rows"] == content["rows"]
    assert len(done) == 10
    assert list(content["summary"]["tokens_per_second_by_model"]) == list(run.MODELS)


def test_rows_of_another_version_are_not_used(
    done: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(tmp_path / "out.json", "--only", "model")
    monkeypatch.setattr(run, "source_digest", lambda: "another")
    call(tmp_path / "out.json", "--only", "model")
    assert len(done) == 8


def test_what_fails_is_told(done: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, content = call(tmp_path / "out.json", "--only", "kernels")
    assert (code, content["summary"]["failed"]) == (1, 10)
    assert content["summary"]["least_speedup_of_kernels"] == 2.0
    assert re.search("4M LoRA bf16, 150 tokens +failed: no compiler", capsys.readouterr().out)


def test_first_and_second_use_follow_each_other(done: list[dict[str, Any]], tmp_path: Path) -> None:
    _, content = call(tmp_path / "out.json", "--only", "records", "--most-records", "10000")
    assert [(row["records"], row["use"]) for row in done] == [
        (1000, "first"), (1000, "second"), (10000, "first"), (10000, "second"),
    ]  # fmt: skip
    assert content["summary"]["seconds_of_second_use"] == 2.5
    assert content["summary"]["anonymous_bytes_of_first_use"] == {"1000": 7, "10000": 7}
