"""Past runs correct predictions; the file is the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunewise.errors import InputError
from tunewise.planner.calibration import (
    CATALOGUED,
    MAX_RATIOS,
    Foretold,
    calibration_file,
    correction,
    learn_from_run,
    note_prediction,
    record_measurement,
)


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path))


def test_without_past_runs_there_is_a_band() -> None:
    fix = correction("T4", "lora bf16 packed", is_measured=False)
    assert (fix.low, fix.factor, fix.high) == CATALOGUED
    assert "no run on this machine is known" in fix.reason


def test_past_runs_move_the_middle_and_make_the_interval() -> None:
    for ratio in (1.0, 1.2, 1.3, 1.4, 1.5):
        record_measurement("T4", "full", ratio * 2.0, 2.0)
    fix = correction("T4", "full", is_measured=False)
    assert fix.factor == pytest.approx(1.3)
    assert [fix.low, fix.high] == pytest.approx([1.08, 1.46])
    assert "5 past runs" in fix.reason


def test_another_kind_takes_the_machines_middle_so_that_kinds_stay_comparable() -> None:
    record_measurement("T4", "full", 3.0, 2.0)
    assert correction("T4", "lora", is_measured=True).factor == pytest.approx(1.5)
    assert correction("A100", "lora", is_measured=True).factor == 1.0


def test_the_file_can_be_read_and_deleted_and_does_not_grow_for_ever() -> None:
    for number in range(MAX_RATIOS + 5):
        record_measurement("T4", "full", 1.0 + number, 1.0)
    kept = json.loads(calibration_file().read_text())["T4"]["full"]
    assert len(kept) == MAX_RATIOS
    assert kept[-1] == MAX_RATIOS + 5
    calibration_file().unlink()
    assert correction("T4", "full", is_measured=False).factor == CATALOGUED[1]


@pytest.mark.parametrize("content", ["{", '{"T4": [1]}', '{"T4": {"full": ["fast"]}}', "[]"])
def test_a_damaged_file_is_an_error_that_names_it(content: str) -> None:
    calibration_file().write_text(content)
    with pytest.raises(InputError, match=r"calibration\.json"):
        correction("T4", "full", is_measured=False)


def test_a_run_teaches_what_was_off(tmp_path: Path) -> None:
    note_prediction("abc", Foretold("Some CPU", "lora fp32 padded", 0.001))
    metrics = tmp_path / "metrics.jsonl"
    seconds = [9.0, 5.0, 4.0, 0.2, 0.2, 0.2, 0.2, 0.3]
    lines = [{"event": "step", "tokens": 100, "seconds": each} for each in seconds]
    metrics.write_text("\n".join(json.dumps(line) for line in [{"event": "note"}, *lines]))
    assert learn_from_run("abc", metrics) == pytest.approx(2.0)
    assert correction("Some CPU", "lora fp32 padded", is_measured=True).factor == pytest.approx(2.0)
    assert learn_from_run("unknown", metrics) is None


def test_a_run_elsewhere_teaches_nothing(tmp_path: Path) -> None:
    note_prediction("abc", Foretold("H100 SXM 80GB", "full", 0.001))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(json.dumps({"event": "step", "tokens": 9, "seconds": 1.0}) for _ in range(20)))
    assert learn_from_run("abc", metrics) is None
