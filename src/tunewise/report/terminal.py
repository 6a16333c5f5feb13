"""What a person sees while something runs: what is going to be done, one line of progress, and what came of it.

On a terminal the progress line is rewritten in place; elsewhere (a pipe, a log) a plain line appears now and then. For
machines there is `JsonLines`: every event as one JSON object a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tunewise.engine.assemble import Plan
from tunewise.export.result import Result
from tunewise.machine.machine import Machine
from tunewise.report.quality_table import show_quality
from tunewise.units import GIB, format_bytes, format_count, format_seconds
from tunewise.workload.corpus import Corpus
from tunewise.workload.diagnosis import Diagnosis, Finding, preview
from tunewise.workload.model import locate

PLAIN_SECONDS = 5.0
"""How often a plain progress line appears where lines cannot be rewritten."""

_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


class Terminal:
    """Shows a training to a person."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._num_steps = 0
        self._started_at: float | None = None
        self._started_step = 0
        self._last_plain = 0.0
        self._line_is_open = False
        self._validation = ""

    def announce(self, plan: Plan, folder: Path) -> None:
        """Say what is going to be done, before weights are loaded."""
        recipe, data = plan.recipe, plan.data
        self._num_steps = plan.num_steps
        show = self._line
        show(f"[bold]tunewise[/] trains [bold]{escape(recipe.model.name)}[/] on [bold]{escape(recipe.data.source)}[/]")
        for sentence in data.said:
            show(f"  data      {escape(sentence)}")
        show_findings(self.console, data.diagnosis.findings)
        show(f"  methods   {', '.join(method.name for method in recipe.methods or ())}")
        size = recipe.batch.documents or recipe.batch.supervised_tokens
        unit = "documents" if recipe.batch.documents else "supervised tokens"
        show(f"  training  {plan.num_steps} steps of {size} {unit}, learning rate {recipe.training.learning_rate:g}")
        show(f"  run       {escape(str(folder))}")

    def observe(self, entry: dict[str, Any]) -> None:
        """Show one event."""
        match entry["event"]:
            case "step":
                self._progress(entry)
            case "evaluation":
                mark = "  (best so far)" if entry["is_best"] else ""
                self._validation = f"  validation {entry['validation_loss']:.4f}"
                general = f"  general text {entry['general_loss']:.4f}" if "general_loss" in entry else ""
                self._line(f"  step {entry['step']:>5}  validation loss {entry['validation_loss']:.4f}{general}{mark}")
            case "note":
                self._line(f"  note      {escape(entry['message'])}")
            case "out_of_memory":
                length = f"at most {entry['row_tokens']} tokens" if entry["row_tokens"] else "one document"
                rows = f"{entry['micro_batch_size']} rows of {length}"
                self._line(
                    f"  [yellow]out of memory[/] in {entry['moment']}: going on with {rows} at once; "
                    "what is learnt in a step stays the same"
                )
            case "damaged_checkpoint":
                self._line(f"  [yellow]damaged checkpoint[/]: {escape(entry['message'])}")
            case "resumed":
                self._line(f"  resumed after step {entry['step']} from {escape(entry['from'])}")
            case _:
                pass

    def finish(self, result: Result) -> None:
        """Say what came of the training, where it is, and how to load it."""
        outcome, saved, show = result.outcome, result.saved, self._line
        rate = outcome.tokens / outcome.seconds if outcome.seconds else 0.0
        show(f"[bold green]done[/]: {outcome.reason}, {outcome.steps} steps in {format_seconds(outcome.seconds)}")
        if outcome.best_loss is not None and outcome.first_loss is not None:
            restored = ", restored" if result.recipe.evaluation.keep_best else ""
            show(
                f"  validation loss {outcome.first_loss:.4f} -> [bold]{outcome.best_loss:.4f}[/] nats per supervised "
                f"token (best at step {outcome.best_step}{restored})"
            )
            if outcome.best_loss >= outcome.first_loss:
                show("  [yellow]warning[/]   the validation loss never fell below what it was before training")
        if outcome.forgetting is not None:
            show(f"  forgetting: the loss on the general text moved by {outcome.forgetting:+.4f} nats per token")
        show(
            f"  {format_count(outcome.tokens)} tokens, {rate:.0f} tokens/s, "
            f"memory {format_bytes(outcome.peak_memory_bytes)}"
        )
        show(f"  saved and read again: {escape(str(saved.folder))}")
        if result.quality is not None:
            show_quality(result.quality, self.console)
        show(escape("\n".join("    " + line for line in how_to_load(result))))

    def _progress(self, entry: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._started_at is None:
            self._started_at, self._started_step = now, entry["step"]
        done = entry["step"] - self._started_step
        rest = self._num_steps - entry["step"]
        left = format_seconds((now - self._started_at) / done * rest) if done else "some time"
        line = (
            f"  step {entry['step']:>5}/{self._num_steps}  loss {entry['loss']:.4f}{self._validation}  "
            f"{entry['tokens'] / entry['seconds']:.0f} tokens/s  {format_bytes(entry['memory_bytes'])}  "
            f"{left} left"
        )
        if self.console.is_terminal:
            self.console.file.write("\r" + line.ljust(min(self.console.width - 1, 110))[: self.console.width - 1])
            self.console.file.flush()
            self._line_is_open = True
        elif now - self._last_plain >= PLAIN_SECONDS or entry["step"] == self._num_steps:
            self._last_plain = now
            self.console.print(line, soft_wrap=True)

    def _line(self, text: str) -> None:
        if self._line_is_open:
            self.console.file.write("\n")
            self._line_is_open = False
        self.console.print(text, soft_wrap=True)


class JsonLines:
    """Prints every event as one JSON object a line on standard output."""

    def announce(self, plan: Plan, folder: Path) -> None:
        """Print the complete recipe and what was found in the data."""
        self._print(
            {"event": "start", "folder": str(folder), "num_steps": plan.num_steps, "said": list(plan.data.said)}
        )
        self._print({"event": "recipe", "id": plan.recipe.id, "recipe": plan.recipe.to_mapping()})

    def observe(self, entry: dict[str, Any]) -> None:
        """Print one event."""
        self._print(entry)

    def finish(self, result: Result) -> None:
        """Print where the result is."""
        best = result.outcome.best_loss
        self._print(
            {
                "event": "result",
                "folder": str(result.saved.folder),
                "kind": result.saved.kind,
                "best_loss": best,
                "passed": None if result.quality is None else result.quality.passed,
            }
        )

    def _print(self, entry: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(entry) + "\n")
        sys.stdout.flush()


def how_to_load(result: Result) -> list[str]:
    """Return the lines of Python that load what was saved."""
    if result.saved.kind == "model":
        return [
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained('{result.saved.folder}')",
        ]
    from_base = f"AutoModelForCausalLM.from_pretrained('{base_folder(result)}')"
    return [
        "from transformers import AutoModelForCausalLM",
        "from peft import PeftModel",
        f"model = PeftModel.from_pretrained({from_base}, '{result.saved.folder}')",
    ]


def base_folder(result: Result) -> str:
    """Return the name under which transformers finds the base model."""
    return locate(result.recipe.model.name)


def show_findings(console: Console, findings: Iterable[Finding]) -> None:
    """Print what the data doctor found, errors first."""
    for finding in findings:
        colour = _COLOURS[finding.severity]
        sentence = str(finding).removeprefix(f"{finding.severity}: ")
        console.print(f"  [{colour}]{finding.severity:<9}[/] {escape(sentence)}", soft_wrap=True)


def show_diagnosis(said: Iterable[str], diagnosis: Diagnosis) -> None:
    """Print what was read and how, and the data doctor's whole diagnosis."""
    console = Console(highlight=False)
    for sentence in said:
        console.print(f"  {escape(sentence)}", soft_wrap=True)
    show_findings(console, diagnosis.findings)
    if not diagnosis.findings:
        console.print("  [green]nothing to complain about[/]")


def show_preview(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, num_records: int) -> None:
    """Print records with what is supervised in green and what is only read dimmed."""
    console = Console(highlight=False)
    for index in range(min(num_records, len(corpus))):
        text = Text()
        for piece, is_supervised in preview(corpus, tokenizer, index):
            text.append(piece, style="green" if is_supervised else "dim")
        console.rule(f"{escape(corpus.origins[index])}: [green]supervised[/], [dim]only read[/]", align="left")
        console.print(text)


MACHINE_COLUMNS = ("GiB", "usable", "GB/s", "bf16", "fp32", "link", "W", "from")
MACHINE_LEGEND = (
    "GiB: memory, and what of it tensors can use. GB/s: its bandwidth. bf16, fp32: dense TFLOP/s.",
    "link: GB/s of NVLink where there is one, else of PCIe, both directions. W: the power limit. From:",
)


def show_machines(machines: list[Machine]) -> None:
    """Print machines as a table that fits into 80 columns, and where its numbers are from."""
    console = Console(highlight=False)
    columns = (Column(name, justify="right", no_wrap=True) for name in MACHINE_COLUMNS)
    table = Table(Column("machine", no_wrap=True), *columns, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    sources: dict[str, int] = {}
    for machine in machines:
        rates = machine.flops_per_second
        link = machine.interconnect.nvlink_bytes_per_second or machine.interconnect.pcie_bytes_per_second
        table.add_row(
            machine.name,
            f"{machine.memory_bytes / GIB:.4g}",
            f"{machine.usable_memory_bytes / GIB:.1f}",
            f"{machine.bandwidth_bytes_per_second / 1e9:.0f}",
            _tera(rates.get("bf16")),
            _tera(rates.get("fp32")),
            "-" if link is None else f"{link / 1e9:.0f}",
            f"{machine.power_watts:.0f}" if machine.power_watts else "-",
            f"[dim]{sources.setdefault(machine.source, len(sources) + 1)}[/]",
        )
    console.print(table)
    for sentence in MACHINE_LEGEND:
        console.print(f"  {sentence}", soft_wrap=True)
    for source, number in sources.items():
        console.print(f"  [dim]{number:>3}[/]  {escape(source)}", soft_wrap=True)


def _tera(flops: float | None) -> str:
    return "-" if flops is None else f"{flops / 1e12:.3g}"
