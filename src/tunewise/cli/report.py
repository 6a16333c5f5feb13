"""`tunewise report RUN`: what a tuning found, as a page that opens offline and as a summary here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a tuning or a study.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes. Default: RUN/report.html")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Make the report of a tuning again from its findings: one HTML file without any request, and a summary."""
    from tunewise.report.findings_file import REPORT_FILE, read_findings
    from tunewise.report.findings_terminal import show_findings
    from tunewise.report.html import write_report

    findings = read_findings(run_folder)
    file = out if out is not None else run_folder / REPORT_FILE
    write_report(findings, file)
    show_findings(findings, file)
    if open_it and typer.launch(file.resolve().as_uri()) != 0:
        typer.echo(f"  no browser could be opened; open {file} yourself", err=True)
