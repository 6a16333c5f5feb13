"""The gate's verdict in a terminal: one line a check, and what was measured besides."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunewise.quality.battery import Comparison
from tunewise.quality.measured import Measured
from tunewise.quality.verdict import QualityReport
from tunewise.report.numbers import NOTHING, signed, significant
from tunewise.report.sections.quality import interval_of

_MARKS = {"passed": "[green]passed[/]", "failed": "[bold red]failed[/]", "not measured": "[dim]not measured[/]"}


def show_quality(report: QualityReport, console: Console | None = None) -> None:
    """Print every check and the verdict."""
    console = console or Console(highlight=False)
    table = _table("check", "", "measured", "95 %", "floor", "demanded")
    for check in report.checks:
        table.add_row(escape(check.name), _MARKS[check.status], *_numbers(check.measured), escape(check.threshold))
    console.print(table)
    verdict = "[bold green]passes[/]" if report.passed else "[bold red]refuses[/]"
    console.print(f"  the quality gate {verdict} this model", soft_wrap=True)
    for reason in report.reasons:
        console.print(f"    {escape(reason)}", soft_wrap=True)


def _numbers(measured: Measured | None) -> tuple[str, str, str]:
    if measured is None:
        return NOTHING, "", ""
    return significant(measured.middle), interval_of(measured), significant(measured.noise_floor)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in columns:
        is_number = name in ("measured", "floor", "after", "before")
        table.add_column(name, justify="right" if is_number else "left")
    return table


def show_evaluation(gate: QualityReport | None, suites: Mapping[str, Mapping[str, Comparison]]) -> None:
    """Print the gate's checks, and every suite's metrics before and after."""
    console = Console(highlight=False)
    if gate is not None:
        show_quality(gate, console)
    for name, metrics in suites.items():
        console.print(f"[bold]{escape(name)}[/]")
        table = _table("metric", "before", "after", "95 %", "floor", "change")
        for metric, found in metrics.items():
            before = NOTHING if found.before is None else significant(found.before.middle)
            after, interval, floor = _numbers(found.after)
            table.add_row(escape(metric), before, after, interval, floor, _change(found))
        console.print(table)


def _change(found: Comparison) -> str:
    if found.change is None:
        return ""
    text = f"{signed(found.change.middle, 4)} ({interval_of(found.change)})"
    return f"[red]{text}[/]" if found.is_worse else text


class AnsweringLine:
    """One line on standard error that counts the prompts that have been answered, rewritten in place."""

    def __init__(self) -> None:
        self._is_open = False

    def show(self, done: int, total: int) -> None:
        """Show how far generation has come; only where a line can be rewritten."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r  {done:>6} of {total} prompts answered")
            sys.stderr.flush()
            self._is_open = True

    def close(self) -> None:
        """End the line."""
        if self._is_open:
            sys.stderr.write("\n")
