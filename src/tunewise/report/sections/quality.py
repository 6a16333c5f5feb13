"""Is the result good: every check of the gate with its number, its interval and its noise floor."""

from __future__ import annotations

from tunewise.lab.findings import Findings
from tunewise.quality.measured import Measured
from tunewise.quality.verdict import Check, QualityReport
from tunewise.report.blocks import Block, Cell, Column, Note, Row, Section, Table, Tone, Words
from tunewise.report.numbers import NOTHING, significant
from tunewise.report.sections.cures import cure_blocks
from tunewise.report.sections.missing import no_training

TITLE = "Is the result good?"
FOOT = (
    "Intervals are 95 %, over documents or prompts. Below the noise floor a difference cannot be told from none with "
    "so many of them. Forgetting is the loss on general text after training minus before."
)

SMALLEST = 0.005
"""Of the way from the smallest sample to the planned one: what would be printed as 0 %."""


def quality_section(findings: Findings) -> Section:
    """Return the section on the gate's verdict."""
    blocks: tuple[Block, ...]
    if findings.quality is None:
        missing = no_training(findings) if findings.training is None else Note("The recipe switches the gate off.")
        blocks = (missing,)
    else:
        blocks = (Words(quality_words(findings.quality)), quality_table(findings.quality))
    if findings.cures is not None:
        blocks += cure_blocks(findings.cures)
    return Section("quality", TITLE, "Quality", blocks)


def quality_words(report: QualityReport) -> tuple[str, ...]:
    """Say the verdict and its reasons, and what it cost to find out."""
    said = ["The quality gate passed the model." if report.passed else "The quality gate refused the model."]
    said += [f"{reason[0].upper()}{reason[1:]}." for reason in report.reasons]
    if report.training_seconds:
        share = report.seconds / report.training_seconds
        measured = f"; {report.fraction:.0%} of the planned sample" if report.fraction < 1.0 else ""
        if report.fraction < SMALLEST:
            measured = ", which pays for the smallest sample that tells anything"
        said.append(f"Measuring took {report.seconds:.1f} s, {share:.0%} of the training's time{measured}.")
    return tuple(said)


def quality_table(report: QualityReport) -> Table:
    """Return one row a check."""
    columns = (
        Column("Check", is_number=False),
        Column("Measured", "95 %"),
        Column("Noise floor", is_extra=True),
        Column("Demanded", is_number=False, is_extra=True),
        Column("Verdict", is_number=False),
    )
    return Table("The gate", columns, tuple(_row(check) for check in report.checks), FOOT)


def interval_of(measured: Measured | None) -> str:
    """Print an interval, "-0.010 to 0.042"; nothing without bounds."""
    return "" if measured is None else f"{significant(measured.low)} to {significant(measured.high)}"


def _row(check: Check) -> Row:
    measured = check.measured
    tone: Tone = {"passed": "", "failed": "bad", "not measured": "dim"}[check.status]  # type: ignore[assignment]
    cells = (
        Cell(check.name, check.sentence),
        Cell(NOTHING if measured is None else significant(measured.middle), interval_of(measured)),
        Cell(NOTHING if measured is None else significant(measured.noise_floor)),
        Cell(check.threshold or NOTHING),
        Cell(check.status, tone=tone),
    )
    return Row(cells)
