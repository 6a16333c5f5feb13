"""What a person sees while a tuning runs: one bar for the budget of the search, and a line a trial."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tunewise.units import format_seconds


class TuningScreen:
    """Shows parts, trials and the final training; elsewhere than on a terminal plain lines appear."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._seconds = 0.0
        self._last = ("", -1.0)

    def part(self, name: str, seconds: float) -> None:
        """A part of the tuning begins; `seconds` is what the whole search may take."""
        if name == "training":
            self._close()
            self.console.print(f"[bold]{name}[/]  about {format_seconds(seconds)}")
            return
        self.console.print(f"[bold]{name}[/]")
        if seconds > 0 and self.console.is_terminal and self._bar is None:
            self._bar = Progress(
                TextColumn("  budget"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[spent]} of {task.fields[allowed]}  {task.description}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=seconds, spent="", allowed=format_seconds(seconds))
            self._bar.start()
        self._seconds = seconds

    def trial(self, what: str, spent_seconds: float) -> None:
        """A trial begins or has ended."""
        is_end = self._last[0] == what
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=spent_seconds, description=escape(what), spent=format_seconds(spent_seconds)
            )
        if is_end:
            took = format_seconds(spent_seconds - self._last[1])
            self.console.print(f"  {took:>8}  {escape(what)}", no_wrap=True, overflow="ellipsis", crop=True)
        self._last = ("", -1.0) if is_end else (what, spent_seconds)

    def training(self, entry: dict[str, Any]) -> None:
        """An event of the final training."""
        if entry["event"] == "evaluation":
            mark = "  (best so far)" if entry["is_best"] else ""
            self.console.print(f"  step {entry['step']:>5}  validation loss {entry['validation_loss']:.4f}{mark}")
        elif entry["event"] in ("note", "out_of_memory"):
            self.console.print(f"  {escape(str(entry['message']))}")

    def close(self) -> None:
        """Take the bar away."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
