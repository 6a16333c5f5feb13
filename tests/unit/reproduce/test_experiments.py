"""Experiments at their smallest size: they run and answer every claim, and what does not depend on size holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunewise.reproduce import ALL, BY_NAME
from tunewise.reproduce import reproduction as reproduction_module
from tunewise.reproduce.bench import Bench, Size
from tunewise.reproduce.claim import Judged, Mark, Verdict, judge

IDENTITIES = {
    "gradient-accumulation": {"exact"},
    "nf4": {"levels", "bits", "saved"},
    "qa-lora": {"merge int4", "merge int3", "merge int2", "bits", "lora size", "qalora size"},
    "flash-attention": {"exact", "flash memory", "plain memory"},
    "nvidia-shapes": {"thin", "cube", "bound", "tokens 768", "tokens 2048", "tokens 4096", "waves"},
    "llama-adapter": {"start", "size"},
    "fp8-lm": {"bytes", "bf16 bytes"},
}
"""Claims that do not depend on how much is computed: they have to come out "same" at any size."""


def run_tiny(name: str, folder: Path) -> dict[str, Judged]:
    evidence = BY_NAME[name].run(Bench(Size.TINY, folder))
    assert evidence.tables
    assert all(len(row) == len(table.columns) for table in evidence.tables for row in table.rows)
    return {claim.key: judge(claim, evidence.findings[claim.key]) for claim in BY_NAME[name].claims}


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_smallest_size(name: str, tmp_path: Path) -> None:
    judged = run_tiny(name, tmp_path)
    assert {key for key in IDENTITIES[name] if judged[key].verdict != Verdict.SAME} == set()


@pytest.mark.parametrize("name", [each.name for each in ALL if each.data])
def test_without_its_data_an_experiment_says_what_it_needs(name: str, tmp_path: Path) -> None:
    judged = run_tiny_without_data(name, tmp_path)
    assert all(each.verdict == Verdict.NOT_TESTABLE and "--shared" in each.reason for each in judged)


def run_tiny_without_data(name: str, folder: Path) -> list[Judged]:
    evidence = BY_NAME[name].run(Bench(Size.TINY, folder / "work", folder))
    return [judge(claim, evidence.findings[claim.key]) for claim in BY_NAME[name].claims]


@pytest.mark.parametrize("name", [each.name for each in ALL if each.needs_bf16])
def test_a_processor_without_bf16_is_told_and_not_kept_waiting(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction_module, "default_compute", lambda device: "fp32")
    evidence = BY_NAME[name].run(Bench(Size.SHORT, tmp_path))
    judged = [judge(claim, evidence.findings[claim.key]) for claim in BY_NAME[name].claims]
    assert all(each.verdict == Verdict.NOT_TESTABLE and "bf16" in each.reason for each in judged)


def test_there_are_at_least_the_twenty() -> None:
    assert len(ALL) >= 20
    assert len(BY_NAME) == len(ALL)
    for reproduction in ALL:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", reproduction.name)
        assert len(reproduction.title) <= 120
        for text in (reproduction.title, reproduction.source, reproduction.setting, reproduction.here):
            assert text.strip()
            assert not text.endswith(".")


def test_what_is_from_memory_is_marked() -> None:
    """Numbers that the reference marks as recalled are not passed off as read."""
    remembered = {"qlora": "nf4", "fp8-lm": "second moment fp8", "qa-lora": "loss int4", "flash-attention": "faster"}
    for name, key in remembered.items():
        (claim,) = [claim for claim in BY_NAME[name].claims if claim.key == key]
        assert claim.mark == Mark.MEMORY
