"""The report on cures: the front of gain against forgetting, every state with its intervals, what was not tried."""

from __future__ import annotations

import io

from rich.console import Console

from tests.unit.report.sample_cures import cures, measured, report
from tests.unit.report.samples import findings
from tests.unit.report.test_sections import section, table, trace, words
from tunewise.report.blocks import Chart, Table
from tunewise.report.charts.cures import front
from tunewise.report.findings_terminal import show_findings
from tunewise.report.html import page

FOUND = findings(quality=report(passed=True), cures=cures())


def drawn() -> Chart:
    return next(block for block in section(FOUND, "quality").blocks if isinstance(block, Chart))


def test_the_front_is_what_nothing_beats() -> None:
    known = (cures().uncured, *cures().points)
    assert [point.name for point in front(known)] == ["replay-1", "uncured"]
    worse = [point for point in known if point.name != "replay-1"]
    assert [point.name for point in front(worse)] == ["scale-0.5", "scale-0.75", "uncured"]


def test_every_state_is_drawn_with_both_intervals_and_the_result_is_ringed() -> None:
    chart = drawn()
    for words_, number in (("uncured", 1), ("without training again", 2), ("trained again", 2)):
        marks = trace(chart, name=words_)
        assert len(marks["x"]) == len(marks["error_x"]["array"]) == len(marks["error_y"]["arrayminus"]) == number
    ring = trace(chart, name="the result")
    assert (ring["x"], ring["y"]) == ([0.03], [0.95])
    (budget,) = chart.figure["layout"]["shapes"]
    assert budget["x0"] == budget["x1"] == 0.05


def test_the_table_and_the_page_have_every_cure() -> None:
    said = words(section(FOUND, "quality"))
    shown = drawn().numbers
    assert isinstance(shown, Table)
    assert [row.cells[0].text for row in shown.rows] == ["uncured", *(point.label for point in cures().points)]
    assert [row.is_chosen for row in shown.rows] == [False] * 5 + [True]
    assert shown.rows[1].cells[1].under == "0.840 to 0.860"
    assert "tunewise train runs/tuned/cures/kl.yaml" in said
    html = page(FOUND)
    assert "What was gained against what was forgotten" in html
    assert "SIGSEGV" in html


def test_the_terminal_shows_them_in_80_columns() -> None:
    stream = io.StringIO()
    show_findings(FOUND, None, Console(file=stream, width=80, highlight=False, color_system=None))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (best,) = [line for line in lines if line.startswith("* replay of 1%")]
    assert "+0.950" in best
    assert "+0.030" in best
    assert "passes" in best
    assert "    tunewise train runs/tuned/cures/kl.yaml" in lines, "whole, to be copied"


def test_forgetting_stands_beside_speed() -> None:
    assert FOUND.methods is not None
    assert "Forgetting" not in words(section(FOUND, "ladder")), "nobody measured it"
    trials = tuple(
        trial.model_copy(update={"forgetting": measured(0.01 * len(trial.on), 0.004) if trial.step_seconds else None})
        for trial in FOUND.methods.trials
    )
    found = FOUND.model_copy(update={"methods": FOUND.methods.model_copy(update={"trials": trials})})
    for part, caption in (("ladder", "One method after the other"), ("front", "What no other combination beats")):
        shown = table(found, part, caption)
        column = [each.title for each in shown.columns].index("Forgetting")
        cells = [row.cells[column] for row in shown.rows]
        assert (cells[-1].text, cells[-1].under != "") in (("+0.030", True), ("+0.040", True), ("+0.020", True))
    stream = io.StringIO()
    show_findings(found, None, Console(file=stream, width=80, highlight=False, color_system=None))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (rung,) = [number for number, line in enumerate(lines) if line.startswith("+ bf16")]
    assert lines[rung].rstrip().endswith("+0.020")
    assert lines[rung + 1].rstrip().endswith("0.0160 to 0.0240")
