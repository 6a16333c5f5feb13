"""A reproduction's lines for the terminal and its page."""

from __future__ import annotations

from tunewise.report.reproductions import (
    figure,
    markdown_table,
    measured,
    overview,
    page,
    published,
    table_of_all,
    table_of_claims,
    terminal,
)
from tunewise.reproduce.bench import Bench, Size
from tunewise.reproduce.claim import Claim, Finding, Mark, judge
from tunewise.reproduce.reproduction import Evidence, Reproduction, Result, Table, judged_result

CLAIMS = (
    Claim(key="a", says="it is two", mark=Mark.READ, published=2.0, tolerance=0.1),
    Claim(key="b", says="it falls", mark=Mark.MEMORY, published=-0.5, unit="nats", expects="below", neutral=0.0),
    Claim(key="c", says="it is fast", mark=Mark.READ, expects="above", neutral=1.0),
)
FINDINGS = {
    "a": Finding.exact(3.0, "three | here"),
    "b": Finding(middle=-0.25, low=-0.3, high=-0.2),
    "c": Finding.untested("needs a GPU"),
}
TABLE = Table(title="figures (nats)", columns=("arm", "loss"), rows=(("plain", 1.23456), ("none", None)))


def measure(bench: Bench) -> Evidence:
    raise AssertionError("only its result is shown")


def result() -> Result:
    reproduction = Reproduction("made", "it is two", "a paper", "a big one", "a small one", CLAIMS, measure)
    return judged_result(
        reproduction, Evidence(FINDINGS, (TABLE,)), size=Size.SHORT, digest="d", seconds=12.3, date="2026-11-29",
        versions={"torch": "2.13", "processor": "a CPU"},
    )  # fmt: skip


def test_the_terminal_shows_paper_ours_ratio_interval_and_verdict() -> None:
    lines = terminal(result()).splitlines()
    assert "      paper 2 x   ours 3 x   ratio 1.5   => differs (three | here)" in lines
    assert (
        "      paper -0.5 (< 0) nats [from memory]   ours -0.25 (-0.3 to -0.2) nats   ratio 0.5   => same direction"
        in lines
    )
    assert "      paper > 1 x   ours -   => not testable here (needs a GPU)" in lines
    assert lines[-1] == "  made: same direction 1, differs 1, not testable here 1  (12 s)"
    assert overview([result(), result()]).splitlines()[-1].split() == ["all", "25", "s"]


def test_the_page_holds_every_claim_and_figure() -> None:
    text = page(result())
    assert "| it is two | read at the source | 2 x | 3 x | 1.5 | **differs** (three \\| here) |" in text
    assert "from memory, unchecked" in text
    assert "| plain | 1.235 |" in text
    assert "| none | - |" in text
    assert "    tunewise reproduce made --short\n" in text
    assert "12 s on a CPU" in text


def test_the_overview_counts_verdicts_and_lists_what_differs() -> None:
    assert "| [made](../reproductions/made/README.md) | it is two |  | 1 | 1 | 1 | 12 |" in table_of_all([result()])
    assert table_of_claims([result()]).count("\n") == 3


def test_numbers_are_short_and_tables_whole() -> None:
    assert [figure(each) for each in (0.0, -0.0, 1234.5, 0.123456)] == ["0", "0", "1234", "0.1235"]
    assert measured(Finding.exact(2.0), "x") == "2 x"
    assert published(judge(CLAIMS[2], FINDINGS["c"])) == "> 1 x"
    assert markdown_table(("a",), [("b",)]) == "| a |\n| --- |\n| b |"
