"""A plan for people: what is recommended, what it takes, what limits, and why everything else was left out."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from tunewise.planner.explain import Explanation
from tunewise.planner.plan import Plan, Row
from tunewise.planner.predict import Interval
from tunewise.recipe import Recipe
from tunewise.units import format_bytes, format_seconds

MOST_REASONS = 8
"""So many groups of rejected combinations are shown; --json has all."""


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console(highlight=False)
    show, best = console.print, plan.best
    name, machine = escape(best.recipe.model.name), escape(plan.machine.name)
    show(f"[bold]{name}[/] on [bold]{machine}[/], {escape(plan.run)}", soft_wrap=True)
    size = f"micro-batch {best.micro_batch_size} x {best.row_width} tokens"
    show(f"  [bold green]{escape(best.label)}[/], {size}", soft_wrap=True)
    for reason in plan.reasons:
        show(f"  {escape(reason)}", soft_wrap=True)
    show(_memory_table(plan))
    show(_moments_table(plan))
    show(f"  speed    {_interval(best.tokens_per_second, '{:.0f}')} tokens/s")
    if plan.speed_limits:
        shares = sorted(plan.speed_limits.items(), key=lambda item: -item[1])
        show(f"           limited by {', '.join(f'{what} {share:.0%}' for what, share in shares if share >= 0.01)}")
    show(f"  time     {_seconds(best.run_seconds)} for {escape(plan.run.split(', ')[0])}")
    if best.cost is not None:
        show(f"  cost     {_interval(best.cost, '{:.2f}')}")
    if best.energy_kwh is not None:
        show(f"  energy   {_interval(best.energy_kwh, '{:.3g}')} kWh at the power limit")
    show(f"  interval {escape(plan.interval)}", soft_wrap=True)
    if len(plan.front) > 1:
        show(_front_table(plan))
    for sentence in plan.advice:
        show(f"  [cyan]shape[/]    {escape(sentence)}", soft_wrap=True)
    _show_rejected(plan, console)
    traced = f"{plan.num_combinations} combinations from {plan.num_traced} traced ones"
    show(f"  [dim]{traced}, {format_seconds(plan.planning_seconds)}[/]")


def plan_to_mapping(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data for `--json`."""
    content = {field.name: _plain(getattr(plan, field.name)) for field in dataclasses.fields(plan)}
    content["rejected"] = [{"label": each.choice.label, "reason": each.reason} for each in plan.rejected]
    return content


def show_explanation(explanation: Explanation, console: Console | None = None) -> None:
    """Print what one method changes."""
    console = console or Console(highlight=False)
    console.print(f"[bold]{escape(explanation.method)}[/] in: {escape(explanation.label)}", soft_wrap=True)
    table = Table("", f"without {escape(explanation.method)}", f"with {escape(explanation.method)}", "difference")
    before, after = explanation.without, explanation.with_it
    for name in before.kinds:
        _row(table, name, before.kinds[name], after.kinds[name], format_bytes)
    _row(table, "peak", before.peak_bytes, after.peak_bytes, format_bytes)
    table.add_row("peak in", before.peak_moment, after.peak_moment, "")
    _row(table, "FLOPs a step", before.step_flops, after.step_flops, lambda value: f"{value / 1e12:.2f} T")
    _row(table, "time of a step", before.step_seconds, after.step_seconds, lambda value: f"{value:.3g} s")
    _row(table, "tokens/s", before.tokens_per_second, after.tokens_per_second, lambda value: f"{value:.0f}")
    _row(table, "trainable", before.trainable, after.trainable, lambda value: f"{value / 1e6:.2f} M")
    console.print(table)
    for note in explanation.notes:
        console.print(f"  {escape(note)}", soft_wrap=True)


def explanation_to_mapping(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as plain data for `--json`."""
    return dataclasses.asdict(explanation)


def _row(table: Table, name: str, before: float, after: float, form: Any) -> None:
    if before == after == 0:
        return
    sign = "+" if after >= before else "-"
    share = f" ({sign}{abs(after / before - 1):.0%})" if before else ""
    table.add_row(name.replace("_", " "), form(before), form(after), f"{sign}{form(abs(after - before))}{share}")


def _memory_table(plan: Plan) -> Table:
    table = Table("memory at the peak", "bytes", "of the peak", title_justify="left")
    best = plan.best
    for name, size in sorted(best.kinds.items(), key=lambda item: -item[1]):
        if size:
            table.add_row(name, format_bytes(size), f"{size / best.peak_bytes:.0%}")
    workspace = best.peak_bytes - sum(best.kinds.values())
    if workspace:
        table.add_row("library workspace", format_bytes(workspace), f"{workspace / best.peak_bytes:.0%}")
    table.add_section()
    source = "dry run" if best.is_confirmed else "composed"
    table.add_row(f"peak, in {best.peak_moment}", format_bytes(best.peak_bytes), source)
    table.add_row("usable", format_bytes(plan.usable_bytes), "")
    room = plan.limit_bytes - best.peak_bytes
    table.add_row("head-room above the margin", format_bytes(room), f"{room / plan.usable_bytes:.0%} of usable")
    return table


def _moments_table(plan: Plan) -> Table:
    """The fullest instant of each part of the run: where memory could be saved, and what it would not save."""
    peaks = plan.moments.values()
    table = Table(Column("peak by moment", no_wrap=True), *plan.moments, title_justify="left")
    for kind in (*plan.best.kinds, "host"):
        if any(peak[kind] for peak in peaks):
            name = "copies on the host" if kind == "host" else kind.replace("_", " ")
            table.add_row(name, *(format_bytes(peak[kind]) if peak[kind] else "-" for peak in peaks))
    table.add_section()
    table.add_row("on the device", *(format_bytes(sum(peak.values()) - peak["host"]) for peak in peaks))
    return table


def _front_table(plan: Plan) -> Table:
    table = Table("no other plan beats these in all of", "memory", "tokens/s", "time", "quality")
    for row in plan.front:
        table.add_row(
            ("* " if row.label == plan.best.label else "  ") + escape(_apart(row, plan.front)),
            format_bytes(row.peak_bytes),
            f"{row.tokens_per_second.middle:.0f}",
            format_seconds(row.run_seconds.middle),
            _quality(row),
        )
    return table


def _apart(row: Row, rows: tuple[Row, ...]) -> str:
    """Return the options in which a plan differs from some other one of the table."""
    columns = zip(*(each.label.split(", ") for each in rows), strict=True)
    differs = [len(set(column)) > 1 for column in columns]
    return ", ".join(word for word, shown in zip(row.label.split(", "), differs, strict=True) if shown)


def _quality(row: Row) -> str:
    count = row.num_approximations
    return str(row.fidelity) + (f", {count} approximation{'s' if count > 1 else ''}" if count else "")


def _show_rejected(plan: Plan, console: Console) -> None:
    counts = Counter(each.reason for each in plan.rejected)
    if not counts:
        return
    console.print(f"  rejected ({len(plan.rejected)}; --json lists all):")
    for reason, count in counts.most_common(MOST_REASONS):
        console.print(f"    {count:>4}  {escape(reason)}", soft_wrap=True)


def _interval(value: Interval, form: str) -> str:
    return f"{form.format(value.middle)} ({form.format(value.low)} to {form.format(value.high)})"


def _seconds(value: Interval) -> str:
    return f"{format_seconds(value.middle)} ({format_seconds(value.low)} to {format_seconds(value.high)})"


def _plain(value: Any) -> Any:
    if isinstance(value, Recipe):
        return value.to_mapping()
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
