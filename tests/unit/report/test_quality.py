"""The gate's verdict in the report and in the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.unit.report.samples import findings
from tunewise.quality.measured import Measured
from tunewise.quality.verdict import Check, QualityReport
from tunewise.report.blocks import Note, Table, Words
from tunewise.report.html import page
from tunewise.report.quality_table import show_quality
from tunewise.report.sections.quality import quality_section, quality_words

REPORT = QualityReport(
    passed=False,
    checks=(
        Check(
            name="task gain",
            status="passed",
            measured=Measured(middle=0.5, low=0.4, high=0.6, noise_floor=0.05, num=40),
            threshold="interval above 0 nats",
            sentence="it fell",
        ),
        Check(name="leaks", status="failed", threshold="at most 5%", sentence="training has seen <b>all</b>"),
        Check(name="forgetting", status="not measured", sentence="no base"),
    ),
    seconds=3.0,
    training_seconds=60.0,
)


def test_the_section_says_verdict_reason_and_cost() -> None:
    words, table = quality_section(findings().model_copy(update={"quality": REPORT})).blocks
    assert isinstance(words, Words)
    assert words.paragraphs == (
        "The quality gate refused the model.",
        "Leaks: training has seen <b>all</b>.",
        "Measuring took 3.0 s, 5% of the training's time.",
    )
    assert isinstance(table, Table)
    assert [[cell.text for cell in row.cells] for row in table.rows] == [
        ["task gain", "0.500", "0.0500", "interval above 0 nats", "passed"],
        ["leaks", "n/a", "n/a", "at most 5%", "failed"],
        ["forgetting", "n/a", "n/a", "n/a", "not measured"],
    ]
    assert table.rows[0].cells[1].under == "0.400 to 0.600"
    assert [row.cells[4].tone for row in table.rows] == ["", "bad", "dim"]


@pytest.mark.parametrize(
    ("fraction", "ending"),
    [
        (1.0, "5% of the training's time."),
        (0.4, "5% of the training's time; 40% of the planned sample."),
        (0.0, "5% of the training's time, which pays for the smallest sample that tells anything."),
    ],
)
def test_how_much_was_measured_is_said(fraction: float, ending: str) -> None:
    assert quality_words(REPORT.model_copy(update={"fraction": fraction}))[-1].endswith(ending)


def test_the_page_escapes_what_was_found() -> None:
    html = page(findings().model_copy(update={"quality": REPORT}))
    assert "training has seen &lt;b&gt;all" in html
    assert "Is the result good?" in html


def test_without_a_gate_the_section_says_why() -> None:
    (note,) = quality_section(findings()).blocks
    assert isinstance(note, Note)
    assert "switches the gate off" in note.text


def test_the_terminal_shows_every_check() -> None:
    out = io.StringIO()
    show_quality(REPORT, Console(file=out, width=140, highlight=False))
    said = out.getvalue()
    for words in (
        "task gain",
        "passed",
        "0.400 to 0.600",
        "failed",
        "not measured",
        "refuses this model",
        "leaks: training",
    ):
        assert words in said
