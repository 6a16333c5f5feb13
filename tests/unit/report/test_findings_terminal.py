"""The summary in a terminal: everything that matters in 80 columns."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.unit.report.samples import CASES, NASTY
from tunewise.report.findings_terminal import show_findings


def shown(case: str, width: int = 80) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, color_system=None)
    show_findings(CASES[case](), Path("runs/tuned/report.html"), console)
    return stream.getvalue()


@pytest.mark.parametrize("case", sorted(set(CASES) - {"hostile"}))
def test_it_fits_into_80_columns(case: str) -> None:
    assert max(map(len, shown(case).splitlines())) <= 80
    assert "…" not in shown(case), "nothing is cut off"


def test_the_answer_the_tables_the_cost_and_where_the_report_is() -> None:
    lines = [line.rstrip() for line in shown("full").splitlines()]
    assert lines[0] == "embedded on stdlib, AMD EPYC 9B45, 2 cores"
    assert lines[2].startswith("  Train with 4,096 supervised tokens a step")
    assert " 4,096    3e-3  2.052 (2.045 to 2.059)   4.42 min  chosen" in lines
    assert "+ bf16            357 ms (350 to 364)        2.86  190 MiB  2.043 ± 0.012" in lines
    assert "  The search took 4.39 min, which costs 0.0059 at 0.08 an hour, 2.2 times the" in lines
    assert lines[-2:] == ["  again   tunewise train runs/tuned/recipe.yaml", "  report  runs/tuned/report.html"]


def test_what_is_missing_is_said() -> None:
    assert "not complete: stopped by its budget of 30 s" in shown("cut_short")
    assert "No methods were tried" in shown("batch_only")
    assert "No batch study was run" in shown("methods_only")


def test_markup_of_a_user_is_text() -> None:
    stream = io.StringIO()
    found = CASES["full"]().model_copy(update={"model": "[red]a[/]", "headline": ("[bold]b[/]",), "command": "[i]c"})
    show_findings(found, None, Console(file=stream, width=80, color_system=None))
    for text in ("[red]a[/]", "[bold]b[/]", "[i]c"):
        assert text in stream.getvalue()
    assert "alert(1)" in NASTY
    assert "<script>alert(1)" in shown("hostile", width=200)
