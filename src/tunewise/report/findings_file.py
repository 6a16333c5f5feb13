"""Findings in their file: `findings.json` in the folder of a tuning or a study."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from tunewise.errors import InputError
from tunewise.lab.findings import Findings

FINDINGS_FILE, REPORT_FILE = "findings.json", "report.html"


def read_findings(folder: Path) -> Findings:
    """Read what a tuning found.

    Raises:
        InputError: there is no such folder or file, or it is damaged, or another version of tunewise wrote it in a form
            that this one does not know.
    """
    file = folder / FINDINGS_FILE
    if not folder.is_dir():
        raise InputError(f"There is no folder '{folder}'. Name the folder of a tuning: tunewise report runs/NAME")
    if not file.is_file():
        raise InputError(
            f"There is no {FINDINGS_FILE} in '{folder}', so there is nothing to report. `tunewise tune` and "
            "`tunewise study` write it; a training alone has none."
        )
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{file} is damaged ({error}). Run the same command again: finished trials are reused."
        ) from None
    try:
        return Findings.model_validate_json(text)
    except ValidationError as error:
        raise InputError(_why_not(file, content, error)) from None


def _why_not(file: Path, content: object, error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole file"
    written = content.get("tunewise") if isinstance(content, dict) else None
    here = metadata.version("tunewise")
    if isinstance(written, str) and written != here:
        return (
            f"{file} was written by tunewise {written[:40]}, and this is tunewise {here}, which stores findings "
            f"differently (at {where}). Make the report with that version, or run the same command again with this one."
        )
    return (
        f"{file} is damaged: {where}: {first['msg']} ({error.error_count()} such places). Run the same command again: "
        "finished trials are reused."
    )
