"""The exact recipe, the command that repeats the training, and what all of it was measured with."""

from __future__ import annotations

from tunewise.lab.findings import Findings
from tunewise.report import numbers
from tunewise.report.blocks import Cell, Code, Column, Row, Section, Table
from tunewise.report.sections.head import date_in_words
from tunewise.units import format_count


def recipe_section(findings: Findings) -> Section:
    """Return the last section."""
    return Section(
        "recipe",
        "The recipe, and how to repeat it",
        "Recipe",
        (
            Code("command", "The command", findings.command),
            Code("yaml", "The recipe", findings.recipe_yaml),
            circumstances(findings),
        ),
    )


def circumstances(findings: Findings) -> Table:
    """Return model, data, machine and versions."""
    words = [
        ("model", f"{findings.model}, {format_count(findings.num_parameters)} parameters"),
        (
            "data",
            f"{findings.data}: {findings.num_documents:,} records, {numbers.tokens(findings.num_tokens)} tokens, "
            f"{numbers.tokens(findings.num_supervised_tokens)} of them supervised; the longest record has "
            f"{numbers.tokens(findings.longest_document)}",
        ),
        ("machine", f"{findings.machine}, {numbers.num_bytes(findings.machine_memory_bytes)} of memory"),
        ("date", date_in_words(findings.date)),
        *sorted(findings.versions.items()),
    ]
    rows = tuple(Row((Cell(name), Cell(value))) for name, value in words)
    return Table("Measured with", (Column("", is_number=False), Column("", is_number=False)), rows)
