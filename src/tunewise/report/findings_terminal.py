"""What a tuning found, in a terminal of 80 columns: the answer, the batch sizes, the ladder, and what it cost."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunewise.lab.cure_findings import CureFindings
from tunewise.lab.findings import BatchFindings, Findings, MethodFindings
from tunewise.report import numbers
from tunewise.report.charts.cures import front
from tunewise.report.sections.batch import verdict
from tunewise.report.sections.cures import change_cell
from tunewise.report.sections.ladder import added, loss_cell, noise_of, rungs, shows_forgetting, times_as_fast
from tunewise.report.sections.missing import COMPLETE, no_batch, no_methods
from tunewise.report.sections.quality import quality_words
from tunewise.report.sections.search import cost_words
from tunewise.report.sections.training import training_words


def show_findings(findings: Findings, report: Path | None = None, console: Console | None = None) -> None:
    """Print what was found, and where the report is."""
    console = console or Console(highlight=False)
    console.print(f"[bold]{escape(findings.model)}[/] on [bold]{escape(findings.data)}[/], {escape(findings.machine)}")
    if findings.outcome != COMPLETE:
        console.print(f"[yellow]not complete[/]: {escape(findings.outcome)}")
    console.print()
    for sentence in findings.headline:
        console.print(Padding(Text(sentence), (0, 0, 0, 2)))
    console.print()
    if findings.batch is not None and findings.batch.curve:
        console.print(_batch_table(findings.batch))
    else:
        console.print(Padding(Text(no_batch(findings).text, style="dim"), (0, 0, 0, 2)))
    if findings.methods is not None and len(rungs(findings.methods)) > 1:
        console.print(_ladder_table(findings.methods, noise_of(findings)))
    elif findings.methods is None:
        console.print(Padding(Text(no_methods(findings).text, style="dim"), (0, 0, 0, 2)))
    console.print()
    said = [cost_words(findings)]
    if findings.confirmation is not None:
        said.append(findings.confirmation.sentence)
    if findings.training is not None:
        said += training_words(findings.training)
    if findings.quality is not None:
        said += quality_words(findings.quality)
    for sentence in said:
        console.print(Padding(Text(sentence), (0, 0, 0, 2)))
    if findings.cures is not None:
        _show_cures(findings.cures, console)
    console.print()
    console.print("  [bold]again[/]   ", Text(findings.command), soft_wrap=True, sep="")
    if report is not None:
        console.print("  [bold]report[/]  ", Text(str(report)), soft_wrap=True, sep="")


def _batch_table(batch: BatchFindings) -> Table:
    table = Table(
        title="Batch size", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1)
    )
    for name, justify in (("tokens", "right"), ("rate", "right"), ("loss, nats", "right"), ("whole run", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("verdict", ratio=1)
    for point in sorted(batch.curve, key=lambda point: point.batch_tokens):
        loss = numbers.nats(point.loss)
        table.add_row(
            numbers.tokens(point.batch_tokens),
            numbers.learning_rate(point.learning_rate),
            f"{loss.text} ({loss.interval})" if loss.interval else loss.text,
            numbers.seconds(point.run_seconds).text,
            escape(verdict(batch, point)),
            style="bold green" if point.batch_tokens == batch.chosen_tokens else None,
        )
    return table


def _show_cures(cures: CureFindings, console: Console) -> None:
    """Print what was tried on a refused model, with the front of gain against forgetting marked."""
    for sentence in cures.sentences:
        console.print(Padding(Text(sentence), (0, 0, 0, 2)))
    wanting = [cure for cure in cures.untried if not cure.is_needless]
    if wanting:
        console.print("  To try them:")
    for cure in wanting:  # whole lines, to be copied
        console.print(Text(f"    {cure.command}"), soft_wrap=True)
    if not cures.points:
        return
    points = (cures.uncured, *cures.points)
    on_front = {point.name for point in front(points)}
    table = Table(title="\nCures", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1))
    table.add_column("* on the front", ratio=1)
    for name in ("gain, nats", "forgetting, nats"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", ratio=1)
    for point in points:
        gain, lost = change_cell(point.gain), change_cell(point.forgetting)
        table.add_row(
            escape(f"{'*' if point.name in on_front else ' '} {point.label}"),
            f"{gain.text}\n{gain.under}".rstrip(),
            f"{lost.text}\n{lost.under}".rstrip(),
            escape(point.verdict),
            style="bold green" if point.name == cures.chosen else None,
        )
    console.print(table)


def _ladder_table(methods: MethodFindings, noise: float | None) -> Table:
    table = Table(title="\nMethods", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1))
    table.add_column("rung", ratio=1)
    shows = shows_forgetting(methods)
    for name in ("step", "× baseline", "memory", "loss, nats", *(["forgetting"] if shows else [])):
        table.add_column(name, justify="right", no_wrap=True)
    trials = rungs(methods)
    for before, trial in zip([None, *trials[:-1]], trials, strict=True):
        loss = loss_cell(trial.loss, noise)
        spread, step = loss.under if noise is not None else "", numbers.seconds(trial.step_seconds)
        forgotten = change_cell(trial.forgetting)
        # With a column more, what qualifies a number goes under it.
        table.add_row(
            escape(added(trial, before)),
            f"{step.text}\n{step.interval}".rstrip() if shows else str(step),
            times_as_fast(trials[0].step_seconds, trial.step_seconds),
            numbers.num_bytes(trial.peak_tensor_bytes).text,
            (f"{loss.text}\n{spread}" if shows else f"{loss.text} {spread}").rstrip(),
            *([f"{forgotten.text}\n{forgotten.under}".rstrip()] if shows else []),
            style="bold green" if trial.label == methods.chosen else None,
        )
    return table
