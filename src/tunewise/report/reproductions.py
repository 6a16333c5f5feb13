"""Reproductions for people: lines for the terminal, and the generated part of their pages in `reproductions/`."""

from __future__ import annotations

from collections.abc import Sequence

from tunewise.reproduce.claim import Finding, Judged, Mark
from tunewise.reproduce.reproduction import Cell, Result, Table

SIDES = {"above": ">", "below": "<"}


def terminal(result: Result) -> str:
    """Return a result as lines: for each claim the source's number, ours with its interval, and the verdict."""
    lines = [f"  {result.source}"]
    for each in result.judged:
        lines.append(f"  - {each.claim.says}")
        paper, ours = f"paper {published(each)}", f"ours {measured(each.finding, each.claim.unit)}"
        ratio = "" if each.ratio is None else f"   ratio {figure(each.ratio)}"
        lines.append(f"      {paper}   {ours}{ratio}   => {each.verdict}{remark(each)}")
    return "\n".join([*lines, f"  {result.name}: {result.summary}  ({result.seconds:.0f} s)"])


def overview(results: Sequence[Result]) -> str:
    """Return a line for each result, and the time of all."""
    lines = [f"{result.name:24} {result.seconds:6.0f} s  {result.summary}" for result in results]
    return "\n".join([*lines, f"{'all':24} {sum(result.seconds for result in results):6.0f} s"])


def published(judged: Judged) -> str:
    """Return what the source says, as a number or as a side, marked where nobody has checked it."""
    claim = judged.claim
    side = "" if claim.neutral is None else f"{SIDES[claim.expects]} {claim.neutral:g}"
    number = "" if claim.published is None else figure(claim.published)
    text = f"{number} ({side})" if number and side else number or side
    return f"{text} {claim.unit}".strip() + (" [from memory]" if claim.mark == Mark.MEMORY else "")


def measured(finding: Finding, unit: str = "") -> str:
    """Return a finding with its interval."""
    if finding.middle is None:
        return "-"
    text = figure(finding.middle)
    if finding.low is not None and finding.high is not None and finding.low < finding.high:
        text += f" ({figure(finding.low)} to {figure(finding.high)})"
    return f"{text} {unit}".strip()


def remark(judged: Judged) -> str:
    """Return the reason of a verdict in brackets, or nothing."""
    return f" ({judged.reason})" if judged.reason else ""


def page(result: Result) -> str:
    """Return the generated part of `reproductions/NAME/README.md`: everything that comes out of the result."""
    head = ("claim", "how we know it", "paper", "ours (95 %)", "ours / paper", "verdict")
    rows = [
        (
            each.claim.says, str(each.claim.mark), published(each), measured(each.finding, each.claim.unit),
            "" if each.ratio is None else figure(each.ratio), f"**{each.verdict}**{remark(each)}",
        )
        for each in result.judged
    ]  # fmt: skip
    known = result.versions
    libraries = ", ".join(f"{name} {known[name]}" for name in ("torch", "transformers") if name in known)
    machine = known.get("processor", "an unknown processor")
    flag = " --short" if result.size == "short" else ""
    parts = [
        f"# {result.title}",
        f"Source: {result.source}.",
        f"Measured there: {result.setting}.",
        f"Measured here: {result.here}.",
        markdown_table(head, rows),
        *(f"{table.title[:1].upper()}{table.title[1:]}:\n\n{_figures(table)}" for table in result.tables),
        f"    tunewise reproduce {result.name}{flag}",
        f"{result.date}, {result.seconds:.0f} s on {machine}, CPU only, {libraries}. "
        "Everything above is made from result.json by `python docs/make_reproductions.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def table_of_all(results: Sequence[Result]) -> str:
    """Return the overview of `docs/reproductions.md`: a row for each reproduction."""
    head = ("reproduction", "what it says", "same", "same direction", "differs", "not testable here", "seconds")
    rows = [
        (
            f"[{result.name}](../reproductions/{result.name}/README.md)", result.title,
            *(str(count) if (count := result.count(verdict)) else "" for verdict in type(result.judged[0].verdict)),
            f"{result.seconds:.0f}",
        )
        for result in results
    ]  # fmt: skip
    return markdown_table(head, rows)


def table_of_claims(results: Sequence[Result]) -> str:
    """Return every claim that differs or could not be tested, with the reason."""
    rows = [
        (
            result.name,
            each.claim.says,
            published(each),
            measured(each.finding, each.claim.unit),
            str(each.verdict),
            each.reason,
        )
        for result in results
        for each in result.judged
        if each.verdict in ("differs", "not testable here")
    ]
    return markdown_table(("reproduction", "claim", "paper", "ours", "verdict", "reason"), rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _figures(table: Table) -> str:
    return markdown_table(table.columns, table.rows)


def _cell(cell: Cell) -> str:
    if cell is None:
        return "-"
    text = figure(cell) if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", " ")


def figure(value: float) -> str:
    """Return a number with four significant digits, so that ours and the paper's can be compared."""
    return "0" if value == 0 else f"{value:.4g}"
