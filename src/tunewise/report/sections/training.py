"""Loss curves, the confirmation with fresh seeds, and the final training."""

from __future__ import annotations

from tunewise.lab.findings import Confirmation, Contender, Findings, TrainingResult
from tunewise.report import numbers
from tunewise.report.blocks import Block, Cell, Column, Note, Row, Section, Table, Words
from tunewise.report.charts.arms import loss_curves
from tunewise.report.charts.training import final_training
from tunewise.report.sections.missing import no_batch, no_training

TITLE = "Loss curves and training"


def training_section(findings: Findings) -> Section:
    """Return the section on losses over time."""
    blocks: list[Block] = []
    if findings.batch is None:
        blocks.append(no_batch(findings))
    else:
        blocks.append(loss_curves(findings.batch) or Note("No arm of the batch study left a loss curve."))
    if findings.confirmation is not None:
        blocks += [Words((findings.confirmation.sentence,), "Confirmation"), confirmation_table(findings.confirmation)]
    else:
        blocks.append(Note("Winner and runner-up were not compared with fresh seeds."))
    if findings.training is None:
        blocks.append(no_training(findings))
    else:
        blocks.append(final_training(findings.training) or Note("The final training was too short for a loss curve."))
        blocks.append(Words(training_words(findings.training)))
    return Section("training", TITLE, "Training", tuple(blocks))


def confirmation_table(found: Confirmation) -> Table:
    """Return winner and runner-up side by side."""
    shows = found.winner.forgetting is not None
    rows = [_contender("winner", found.winner, is_chosen=True, shows_forgetting=shows)]
    if found.runner_up is not None:
        rows.append(_contender("runner-up", found.runner_up, is_chosen=False, shows_forgetting=shows))
    columns = (
        Column("Recipe", is_number=False),
        Column("Loss", "nats, 95 %"),
        *([Column("Forgetting", "nats, 95 %")] if shows else []),
        Column("Time of a step"),
        Column("Speed", "tokens/s", is_extra=True),
        Column("Peak memory"),
        Column("Outcome", is_number=False),
    )
    seeds = f"{found.num_seeds} fresh seed{'s' if found.num_seeds != 1 else ''}, equal tokens"
    foot = f"With {seeds}; the peak is that of the worst batch at full length."
    return Table("Winner against runner-up", columns, tuple(rows), foot)


def _contender(role: str, each: Contender, *, is_chosen: bool, shows_forgetting: bool) -> Row:
    cells = (
        Cell(each.label, role),
        Cell.of(numbers.nats(each.loss)),
        *([Cell.of(numbers.nats(each.forgetting))] if shows_forgetting else []),
        Cell.of(numbers.seconds(each.step_seconds)),
        Cell.of(numbers.rate(each.tokens_per_second, "")),
        Cell(numbers.num_bytes(each.peak_tensor_bytes).text),
        Cell(each.outcome, tone="" if each.outcome == "measured" else "bad"),
    )
    return Row(cells, is_chosen)


def training_words(training: TrainingResult) -> tuple[str, ...]:
    """Say what the final training did and where its result lies."""
    said = (
        f"{training.steps:,} steps over {numbers.tokens(training.tokens)} tokens in "
        f"{numbers.seconds(training.seconds)}, with {numbers.num_bytes(training.peak_memory_bytes)} of memory at most."
    )
    if training.first_loss is not None and training.best_loss is not None:
        where = f" at step {training.best_step:,}, which was kept" if training.best_step is not None else ""
        said += f" The validation loss fell from {training.first_loss:.3f} to {training.best_loss:.3f} nats{where}."
        if training.best_loss >= training.first_loss:
            said = said.replace("fell from", "did not fall: from")
    else:
        said += " Without validation data it is not known how well it generalizes."
    return (said, f"Saved in {training.saved}.")
