"""Why a section has nothing to show, in one sentence."""

from __future__ import annotations

from tunewise.lab.findings import Findings
from tunewise.report.blocks import Note

COMPLETE = "complete"


def no_batch(findings: Findings) -> Note:
    """Say why there is no batch study."""
    return _why(
        findings,
        "No batch study was run",
        "`tunewise study batch` and `tunewise tune` run one; it needs validation data",
    )


def no_methods(findings: Findings) -> Note:
    """Say why there is nothing about methods."""
    return _why(findings, "No methods were tried", "`tunewise study methods` and `tunewise tune` try them")


def no_training(findings: Findings) -> Note:
    """Say why there is no final training."""
    return _why(
        findings, "Nothing was trained in the end", "`tunewise tune` trains with the winner, and the command below does"
    )


def _why(findings: Findings, what: str, otherwise: str) -> Note:
    if findings.outcome != COMPLETE:
        return Note(f"{what}: {findings.outcome}.")
    return Note(f"{what}. {otherwise[0].upper() + otherwise[1:] if otherwise[0] != '`' else otherwise}.")
