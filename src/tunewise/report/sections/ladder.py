"""The ladder of methods, rung by rung, and the front of time and memory."""

from __future__ import annotations

from tunewise.lab.findings import Findings, MethodFindings, MethodTrial
from tunewise.lab.outcome import Interval
from tunewise.report import numbers
from tunewise.report.blocks import Block, Cell, Column, Note, Row, Section, Table, Tone, Words, bars, exactly
from tunewise.report.charts.methods import QUALITIES, fidelity, fronts, pareto
from tunewise.report.sections.cures import change_cell


def ladder_section(methods: MethodFindings, noise: float | None) -> Section:
    """Return the section on the ladder; `noise` is the loss's standard deviation between seeds, in nats."""
    blocks: list[Block] = [Words(methods.sentences)]
    if len(rungs(methods)) > 1:
        blocks.append(ladder_table(methods, noise))
    else:
        blocks.append(Note("No method was added to the baseline, so there is no ladder."))
    return Section("ladder", "The ladder of methods", "Ladder", tuple(blocks))


def front_section(methods: MethodFindings, noise: float | None) -> Section:
    """Return the section on time against memory."""
    chart = pareto(methods, trial_table(methods))
    if chart is None:
        return Section("front", "Time against memory", "Front", (Note("No combination was measured to its end."),))
    return Section("front", "Time against memory", "Front", (chart, front_table(methods, noise)))


def noise_of(findings: Findings) -> float | None:
    """Return the standard deviation of the loss between seeds, if a batch study measured it."""
    return findings.batch.seed_noise if findings.batch is not None else None


def rungs(methods: MethodFindings) -> list[MethodTrial]:
    """Return the trials of the ladder in their order."""
    by_label = {trial.label: trial for trial in methods.trials}
    return [by_label[label] for label in methods.ladder if label in by_label]


def added(trial: MethodTrial, before: MethodTrial | None) -> str:
    """Name what a rung adds to the one before."""
    if before is None:
        return trial.label
    new = [name for name in trial.on if name not in before.on]
    gone = [name for name in before.on if name not in trial.on]
    return " ".join([*(f"+ {name}" for name in new), *(f"− {name}" for name in gone)]) or trial.label


def in_words(methods: MethodFindings, trial: MethodTrial, before: MethodTrial | None) -> str:
    """Say what a rung changes: "padded → packed"."""
    new = set(trial.on) - set(before.on if before is not None else trial.on)
    return ", ".join(f"{factor.off} → {factor.on}" for factor in methods.factors if factor.name in new)


FORGETTING = Column("Forgetting", "nats, 95 %")
"""Beside the speed: the rise of the loss on general text over a trial's steps."""


def shows_forgetting(methods: MethodFindings) -> bool:
    """Tell whether any trial measured forgetting."""
    return any(trial.forgetting is not None for trial in methods.trials)


def loss_cell(loss: float | None, noise: float | None) -> Cell:
    """Print a loss with twice the noise between seeds, where that is known."""
    if loss is None:
        return Cell(numbers.NOTHING)
    return Cell(f"{loss:.3f}", f"± {2 * noise:.3f}" if noise is not None else "one seed")


def ladder_table(methods: MethodFindings, noise: float | None) -> Table:
    """Return the ladder: time, memory and loss of every rung, each beside what it was at first."""
    trials = rungs(methods)
    times = bars([trial.step_seconds for trial in trials])
    sizes = bars([exactly(trial.peak_tensor_bytes) for trial in trials])
    shows = shows_forgetting(methods)
    rows = []
    for index, trial in enumerate(trials):
        before = trials[index - 1] if index else None
        tone: Tone = "chosen" if trial.label == methods.chosen else ""
        failed = "" if trial.outcome == "measured" else trial.outcome
        cells = (
            Cell(added(trial, before), failed or in_words(methods, trial, before)),
            Cell.of(numbers.seconds(trial.step_seconds), times[index], tone),
            Cell(times_as_fast(trials[0].step_seconds, trial.step_seconds)),
            Cell.of(numbers.num_bytes(trial.peak_tensor_bytes), sizes[index], tone),
            Cell(_share(trials[0].peak_tensor_bytes, trial.peak_tensor_bytes)),
            loss_cell(trial.loss, noise),
            *([change_cell(trial.forgetting)] if shows else []),
        )
        rows.append(Row(cells, trial.label == methods.chosen))
    columns = (
        Column("Rung", is_number=False),
        Column("Time of a step"),
        Column("Speed", "× baseline", is_extra=True),
        Column("Peak memory"),
        Column("Memory", "% of baseline", is_extra=True),
        Column("Loss", "nats"),
        *([FORGETTING] if shows else []),
    )
    return Table("One method after the other", columns, tuple(rows), _ladder_foot(trials, noise))


def _ladder_foot(trials: list[MethodTrial], noise: float | None) -> str:
    said = (
        "Every rung learns from the same global batches. Times are medians, with their spread over steps and repeats; "
        "memory is the most that tensors took in the worst batch, with update and evaluation. "
    )
    if any(trial.forgetting is not None for trial in trials):
        said += "Forgetting is what the loss on general text rose by over these few steps; a whole training has more. "
    losses = [trial.loss for trial in trials if trial.loss is not None]
    if not losses:
        return said + "There is no validation loss, so equal quality is not shown here."
    if noise is None:
        return said + "The loss is of one seed at equal tokens; the noise between seeds was not measured."
    spread = max(losses) - min(losses)
    equal = "so no rung can be told from another" if spread <= 2.83 * noise else "so not all rungs are equal"
    return said + f"Losses at equal tokens spread over {spread:.3f} nats, {equal}; ± is twice the noise between seeds."


def times_as_fast(first: Interval | None, now: Interval | None) -> str:
    """Print how many times as fast as the baseline."""
    if first is None or now is None or now.middle <= 0:
        return numbers.NOTHING
    return numbers.significant(first.middle / now.middle)


def _share(first: int | None, now: int | None) -> str:
    return f"{100 * now / first:.0f}" if first and now else numbers.NOTHING


def front_table(methods: MethodFindings, noise: float | None) -> Table:
    """Return the members of the front, numbered as in the chart."""
    promises = {name: words for name, words, *_ in QUALITIES}
    shows = shows_forgetting(methods)
    rows = tuple(
        Row(
            (
                Cell(f"{index}  {trial.label}"),
                Cell.of(numbers.seconds(trial.step_seconds)),
                Cell.of(numbers.rate(trial.tokens_per_second, "")),
                Cell.of(numbers.num_bytes(trial.peak_tensor_bytes)),
                loss_cell(trial.loss, noise),
                *([change_cell(trial.forgetting)] if shows else []),
                Cell(promises[fidelity(methods, trial)]),
            ),
            trial.label == methods.chosen,
        )
        for index, trial in enumerate(fronts(methods), 1)
    )
    columns = (
        Column("On the front", is_number=False),
        Column("Time of a step"),
        Column("Speed", "tokens/s", is_extra=True),
        Column("Peak memory"),
        Column("Loss", "nats"),
        *([FORGETTING] if shows else []),
        Column("Promise", is_number=False),
    )
    return Table("What no other combination beats", columns, rows)


def trial_table(methods: MethodFindings) -> Table:
    """Return every combination, predicted and measured, with the numerical gate."""
    shows = shows_forgetting(methods)
    rows = tuple(
        Row(
            (
                Cell(trial.label),
                Cell(trial.role),
                Cell.of(numbers.seconds(trial.predicted_step_seconds)),
                Cell.of(numbers.seconds(trial.step_seconds)),
                Cell.of(numbers.num_bytes(trial.predicted_peak_bytes)),
                Cell.of(numbers.num_bytes(trial.peak_tensor_bytes)),
                Cell(numbers.nats(trial.loss).text),
                *([change_cell(trial.forgetting)] if shows else []),
                gate_cell(trial),
                Cell(trial.outcome if trial.outcome != "measured" else f"{trial.repeats} times"),
            ),
            trial.label == methods.chosen,
        )
        for trial in methods.trials
    )
    columns = (
        Column("Combination", is_number=False),
        Column("Run as", is_number=False, is_extra=True),
        Column("Step", "predicted"),
        Column("Step", "measured"),
        Column("Peak", "predicted"),
        Column("Peak", "measured"),
        Column("Loss", "nats"),
        *([FORGETTING] if shows else []),
        Column("Gradient differs by", "relative"),
        Column("Measured", is_number=False),
    )
    foot = (
        "The gradient of the first global batch is compared with that of the same learning problem in its plain form."
    )
    return Table("Every combination", columns, rows, foot)


def gate_cell(trial: MethodTrial) -> Cell:
    """Print how far a trial's gradient is from that of the plain form, and what is allowed."""
    if trial.gradient_error is None:
        return Cell(numbers.NOTHING)
    if trial.tolerance is None:
        return Cell(numbers.tiny(trial.gradient_error), "nothing to compare with")
    tone: Tone = "bad" if trial.gradient_error > trial.tolerance else ""
    return Cell(numbers.tiny(trial.gradient_error), f"allowed {numbers.tiny(trial.tolerance)}", tone=tone)
