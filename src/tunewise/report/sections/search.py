"""What it cost to find out, what did not work, and what would change on another machine."""

from __future__ import annotations

from tunewise.lab.findings import Findings
from tunewise.lab.outcome import Interval
from tunewise.report import numbers
from tunewise.report.blocks import Bar, Block, Cell, Column, Note, Row, Section, Table, Words, bars


def cost_section(findings: Findings) -> Section:
    """Return the section on the cost of the search."""
    blocks: list[Block] = [Words((cost_words(findings),))]
    if findings.costs:
        blocks.append(cost_table(findings))
    else:
        blocks.append(Note("The time was not kept by part."))
    return Section("cost", "What it cost to find out", "Cost", tuple(blocks))


def cost_words(findings: Findings) -> str:
    """Say what the search took, beside its budget and the training it is for."""
    said = f"The search took {numbers.seconds(findings.search_seconds)}"
    if findings.price_per_hour is not None:
        amount = money(findings.search_seconds / 3600 * findings.price_per_hour)
        said += f", which costs {amount} at {findings.price_per_hour:g} an hour"
    if findings.training is not None and findings.training.seconds > 0:
        said += f", {numbers.roughly(findings.search_seconds / findings.training.seconds)} times the final training"
    trials = sum(cost.num_trials for cost in findings.costs)
    reused, failed = (sum(getattr(cost, name) for cost in findings.costs) for name in ("num_reused", "num_failed"))
    if findings.budget_seconds is not None:
        said += f"; the budget for everything was {numbers.seconds(findings.budget_seconds)}"
    said += f". Trials run: {trials}, of them without a result: {failed}"
    return said + (f"; reused from before: {reused}." if reused else ".")


def money(amount: float) -> str:
    """Print an amount in the currency of the price."""
    return f"{amount:.2f}" if amount >= 0.1 else numbers.roughly(amount)


def cost_table(findings: Findings) -> Table:
    """Return the cost by part."""
    spent: list[Interval | None] = [
        Interval(middle=cost.seconds, low=cost.seconds, high=cost.seconds) for cost in findings.costs
    ]
    drawn: list[Bar | None] = bars(spent)
    total = sum(cost.seconds for cost in findings.costs)
    rows = tuple(
        Row(
            (
                Cell(cost.part),
                Cell(numbers.seconds(cost.seconds).text, bar=bar),
                Cell(f"{100 * cost.seconds / total:.0f} %" if total else numbers.NOTHING),
                *(Cell(str(count)) for count in (cost.num_trials, cost.num_failed, cost.num_reused)),
            )
        )
        for cost, bar in zip(findings.costs, drawn, strict=True)
    )
    columns = (
        Column("Part", is_number=False),
        Column("Time"),
        Column("Share", is_extra=True),
        Column("Trials", "run"),
        Column("Failed"),
        Column("Reused"),
    )
    return Table("Time by part", columns, rows)


def failure_section(findings: Findings) -> Section:
    """Return the section on what was excluded and what failed."""
    rows = []
    if findings.methods is not None:
        for name, reason in findings.methods.excluded:
            rows.append(Row((Cell(name), Cell("excluded"), Cell(reason))))
        for trial in findings.methods.trials:
            if trial.outcome != "measured":
                rows.append(Row((Cell(trial.label), Cell("no result"), Cell(trial.outcome))))
    if findings.batch is not None:
        for arm in findings.batch.arms:
            if arm.outcome != "measured":
                rate = numbers.learning_rate(arm.learning_rate)
                name = f"batch {numbers.tokens(arm.batch_tokens)}, learning rate {rate}"
                rows.append(Row((Cell(name), Cell("no result"), Cell(arm.outcome))))
    title, short = "What was left out and what failed", "Left out"
    if not rows:
        return Section("left-out", title, short, (Note("Nothing was excluded, and no trial failed."),))
    columns = (
        Column("What", is_number=False),
        Column("What came of it", is_number=False),
        Column("Reason", is_number=False),
    )
    return Section("left-out", title, short, (Table("Excluded, rejected and failed", columns, tuple(rows)),))


def elsewhere_section(findings: Findings) -> Section:
    """Return the section on other machines."""
    title = "What would change on another machine"
    if not findings.elsewhere:
        return Section("elsewhere", title, "Elsewhere", (Note("No plan was made for another machine."),))
    rows = tuple(
        Row(
            (
                Cell(each.machine),
                Cell(each.label or "–"),
                Cell.of(numbers.seconds(each.run_seconds)),
                Cell(numbers.num_bytes(each.peak_bytes).text),
                Cell.of(numbers.rate(each.tokens_per_second, "")),
                Cell(each.change or "–"),
            )
        )
        for each in findings.elsewhere
    )
    columns = (
        Column("Machine", is_number=False),
        Column("Recipe there", is_number=False),
        Column("Whole run"),
        Column("Peak memory"),
        Column("Speed", "tokens/s", is_extra=True),
        Column("What changes", is_number=False),
    )
    foot = f"Predicted, not measured, for the same batch; measured here on {findings.machine}."
    return Section("elsewhere", title, "Elsewhere", (Table("Predictions for other machines", columns, rows, foot),))
