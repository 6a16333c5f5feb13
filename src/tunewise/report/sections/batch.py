"""Which batch size, and why: the curve, its numbers, what the gradient's noise says, and how the batch is cut up."""

from __future__ import annotations

from tunewise.lab.findings import BatchFindings, BatchPoint, Findings, NoiseScale
from tunewise.report import numbers
from tunewise.report.blocks import Block, Cell, Chart, Column, Group, Note, Row, Section, Table, Words
from tunewise.report.charts.arms import learning_rates, rounds
from tunewise.report.charts.batch import batch_curve
from tunewise.report.charts.micro_batch import micro_batches
from tunewise.report.sections.missing import no_batch


def batch_section(findings: Findings) -> Section:
    """Return the section on the batch size."""
    batch = findings.batch
    if batch is None:
        return Section("batch", "Batch size", "Batch size", (no_batch(findings),))
    blocks: list[Block] = [Words(batch.sentences)]
    bounds = noise_table(batch) if batch.noise or batch.critical_batch is not None else None
    if len(batch.curve) > 1:
        blocks += [batch_curve(batch, bounds), batch_table(batch)]
    else:
        tried = "Only one batch size gave a result" if batch.curve else "No batch size gave a result"
        blocks.append(Note(f"{tried}, so there is no curve to show."))
        blocks += [batch_table(batch)] if batch.curve else []
        blocks += [bounds] if bounds is not None else []
    if batch.noise:
        blocks.append(Words((agreement(batch.noise),)))
    charts: list[Chart | Words | Note] = [each for each in (rounds(batch), learning_rates(batch)) if each is not None]
    if charts:
        blocks.append(Group(tuple(charts)))
    blocks += _micro_batch(batch)
    return Section("batch", "Batch size", "Batch size", tuple(blocks))


def batch_table(batch: BatchFindings) -> Table:
    """Return every batch size with its result, its cost and the verdict."""
    columns = (
        Column("Batch", "tokens"),
        Column("Loss", "nats, 95 %"),
        Column("Whole run"),
        Column("Verdict", is_number=False),
        Column("Records", "a step"),
        Column("Learning", "rate"),
        Column("Seeds"),
        Column("Speed", "tokens/s"),
    )
    rows = tuple(
        Row(
            (
                Cell(numbers.tokens(point.batch_tokens)),
                Cell.of(numbers.nats(point.loss)),
                Cell(numbers.seconds(point.run_seconds).text),
                Cell(verdict(batch, point)),
                Cell(numbers.roughly(records(batch, point.batch_tokens))),
                Cell(numbers.learning_rate(point.learning_rate)),
                Cell(str(point.num_seeds)),
                Cell(numbers.rate(point.tokens_per_second, "").text),
            ),
            point.batch_tokens == batch.chosen_tokens,
        )
        for point in sorted(batch.curve, key=lambda point: point.batch_tokens)
    )
    noise = (
        f"Noise between seeds: {batch.seed_noise:.4f} nats (standard deviation)."
        if batch.seed_noise is not None
        else "The noise between seeds was not measured."
    )
    return Table(
        "Every batch size tried", columns, rows, f"{noise} Differences up to {batch.tie_band:.3f} nats are noise."
    )


def records(batch: BatchFindings, tokens: float) -> float:
    """Return how many records hold so many supervised tokens, on average."""
    return batch.documents * tokens / batch.chosen_tokens


def verdict(batch: BatchFindings, point: BatchPoint) -> str:
    """Say what came of one batch size."""
    budget = max(each.budget_tokens for each in batch.curve)
    if point.batch_tokens == batch.chosen_tokens:
        return "chosen"
    if point.budget_tokens < budget:
        return f"dropped after {numbers.tokens(point.budget_tokens)} tokens"
    best = min(each.loss.middle for each in batch.curve if each.budget_tokens == budget)
    if point.loss.middle == best:
        chosen = [each.run_seconds for each in batch.curve if each.batch_tokens == batch.chosen_tokens]
        return "lowest loss, but slower" if chosen and chosen[0] < point.run_seconds else "lowest loss"
    if point.is_tied:
        return "as good, within noise"
    return f"worse than the best by {point.loss.middle - best:.3f}"


def noise_table(batch: BatchFindings) -> Table:
    """Return the two estimates of the noise scale and the critical batch."""
    columns = (
        Column("What bounds the batch", is_number=False),
        Column("Tokens"),
        Column("95 % interval", "tokens"),
        Column("From", is_number=False),
    )
    rows = [
        Row(
            (
                Cell(f"noise scale, {each.estimator}"),
                Cell(numbers.tokens(each.tokens) if each.tokens is not None else "lost in the noise"),
                Cell(
                    f"{numbers.grouped(each.low)} to {'no bound' if each.high is None else numbers.grouped(each.high)}"
                ),
                Cell(f"{each.num_batches} steps"),
            )
        )
        for each in batch.noise
    ]
    if batch.critical_batch is not None:
        critical = batch.critical_batch
        cells = (
            Cell("critical batch"),
            Cell(numbers.tokens(critical.middle)),
            Cell(f"{numbers.grouped(critical.low)} to {numbers.grouped(critical.high)}"),
            Cell("the losses"),
        )
        rows.append(Row(cells))
    foot = (
        "The noise scale (McCandlish et al. 2018) is the batch at which the gradient's noise equals its signal. The "
        "critical batch is where doubling the batch needs 1.5 times the tokens of a tiny batch."
    )
    return Table("Noise scale and critical batch", columns, tuple(rows), foot)


def agreement(noise: tuple[NoiseScale, ...]) -> str:
    """Say whether the estimators of the noise scale agree."""
    if len(noise) < 2:
        return "Only one of the two estimators of the noise scale was run, so nothing checks it."
    low = max(each.low for each in noise)
    high = min((each.high for each in noise if each.high is not None), default=None)
    if high is not None and low > high:
        return "The two estimators of the noise scale contradict each other: their intervals do not overlap."
    return "The two estimators of the noise scale agree within their intervals."


def _micro_batch(batch: BatchFindings) -> list[Block]:
    rows = "one row" if batch.micro_batch_size == 1 else f"{batch.micro_batch_size} rows"
    many = f"{batch.num_micro_batches:.3g} micro-batches of {rows}"
    said = [f"The batch passes through the machine as {many} on average: {batch.micro_batch_reason}."]
    if batch.line is not None:
        line = batch.line
        update = f", and an update {numbers.seconds(line.update_seconds)}" if line.update_seconds is not None else ""
        said.append(
            f"A micro-batch costs {numbers.seconds(line.t0_seconds)} and {numbers.seconds(line.t1_seconds_per_row)} a "
            f"row (least squares, the dotted line){update}."
        )
    words = Words(tuple(said), "How the batch is cut up")
    chart = micro_batches(batch)
    if chart is None:
        return [words, Note("The speed of other micro-batches was not measured.")]
    return [Group((chart, words))]
