"""`tunewise evaluate RUN|MODEL`: is the result good, and what did it forget?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder; or hub id, folder, 'embedded'.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What to measure. Default: gate for a run, general for a model."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Questions or records, for suites that need them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure forgetting, overfitting, answers, ... of a run beside its base, or of a model; judge a run."""
    from tunewise.cli.train import refuse_failed
    from tunewise.evaluation import evaluate, write_report
    from tunewise.report.quality_table import AnsweringLine, show_evaluation

    line = AnsweringLine()
    found = evaluate(target, tuple(suite or ()), data, progress=line.show)
    line.close()
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        show_evaluation(found.gate, found.suites)
    if found.gate is not None:
        write_report(found.gate, Path(target))
    refuse_failed(found.gate, Path(target))
