"""The top of the page: what was chosen and why in three sentences, and the figures that matter, at a glance."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from tunewise.lab.findings import BatchFindings, Findings, MethodFindings, MethodTrial
from tunewise.report import numbers
from tunewise.report.sections.missing import COMPLETE


@dataclass(frozen=True)
class Tile:
    """One figure: what it is, its value, and how well it is known or what it is beside."""

    title: str
    value: str
    unit: str
    under: str


@dataclass(frozen=True)
class Head:
    """The top of the page; `warning` says what is missing, "" when the tuning is complete."""

    title: str
    subject: str
    sentences: tuple[str, ...]
    warning: str
    tiles: tuple[Tile, ...]


def head_of(findings: Findings) -> Head:
    """Return the top of the page."""
    warning = "" if findings.outcome == COMPLETE else findings.outcome
    subject = f"{findings.machine} · {date_in_words(findings.date)}"
    title = f"{findings.model} on {findings.data}"
    return Head(title, subject, findings.headline, warning, tiles(findings))


def date_in_words(date: str) -> str:
    """Print an ISO date as people write it; another text stays as it is."""
    try:
        moment = datetime.datetime.fromisoformat(date)
    except ValueError:
        return date
    return f"{moment.day} {moment:%B %Y, %H:%M}{' UTC' if moment.utcoffset() == datetime.timedelta(0) else ''}"


def tiles(findings: Findings) -> tuple[Tile, ...]:
    """Return the figures at a glance; one that is not known is left out."""
    found: list[Tile] = []
    if findings.batch is not None:
        found.append(_batch(findings.batch))
    if findings.methods is not None:
        found += _methods(findings.methods)
    if findings.training is not None:
        best, first = findings.training.best_loss, findings.training.first_loss
        if best is not None and first is not None:
            found.append(Tile("Validation loss", f"{best:.3f}", "nats", f"from {first:.3f} before training"))
        found.append(_split("Final training", numbers.seconds(findings.training.seconds), _predicted(findings)))
    found.append(_split("Cost of finding out", numbers.seconds(findings.search_seconds), _search(findings)))
    return tuple(found)


def _batch(batch: BatchFindings) -> Tile:
    others = [numbers.tokens(each) for each in batch.undecided if each != batch.chosen_tokens]
    records = f"about {numbers.roughly(batch.documents)} records"
    under = f"{records} a step; as good: {', '.join(others)}" if others else f"{records} a step"
    return Tile("Batch", numbers.tokens(batch.chosen_tokens), "tokens", under)


def _methods(methods: MethodFindings) -> list[Tile]:
    first, chosen = baseline(methods), trial_of(methods, methods.chosen)
    if first is None or chosen is None or first.label == chosen.label:
        return []
    return [*_speed(first, chosen), *_memory(first, chosen)]


def _speed(first: MethodTrial, chosen: MethodTrial) -> list[Tile]:
    if chosen.step_seconds is None:
        return []
    now = numbers.seconds(chosen.step_seconds)
    if first.step_seconds is None:
        return [_split("Time of a step", now, f"{now.interval}; the baseline did not run: {first.outcome}")]
    faster = numbers.quotient(first.step_seconds, chosen.step_seconds)
    before = f"{numbers.seconds(first.step_seconds).text} → {now.text} a step"
    interval = numbers.ratio(faster).interval
    under = f"{interval} times the baseline's; {before}" if interval else f"times the baseline's; {before}"
    return [Tile("Speed", f"{numbers.significant(faster.middle)}×", "", under)]


def _memory(first: MethodTrial, chosen: MethodTrial) -> list[Tile]:
    if chosen.peak_tensor_bytes is None:
        return []
    number = numbers.num_bytes(chosen.peak_tensor_bytes)
    if first.peak_tensor_bytes is None:
        return [_split("Peak memory", number, f"the baseline did not run: {first.outcome}")]
    share = numbers.change(chosen.peak_tensor_bytes / first.peak_tensor_bytes).text
    beside = f"{share} against the baseline's {numbers.num_bytes(first.peak_tensor_bytes).text}"
    return [_split("Peak memory", number, beside)]


def _predicted(findings: Findings) -> str:
    if findings.training is None or findings.training.predicted_seconds is None:
        return f"{findings.training.steps:,} steps" if findings.training else ""
    return f"predicted: {numbers.seconds(findings.training.predicted_seconds)}"


def _search(findings: Findings) -> str:
    trials = sum(cost.num_trials for cost in findings.costs)
    said = f"{trials} trial{'s' if trials != 1 else ''}"
    if findings.budget_seconds is not None:
        said += f"; the budget was {numbers.seconds(findings.budget_seconds)}"
    return said


def _split(title: str, number: numbers.Number, under: str) -> Tile:
    value, _, unit = number.text.partition(" ")
    return Tile(title, value, unit, under)


def trial_of(methods: MethodFindings, label: str) -> MethodTrial | None:
    """Return the trial with a label."""
    return next((trial for trial in methods.trials if trial.label == label), None)


def baseline(methods: MethodFindings) -> MethodTrial | None:
    """Return the trial of the recipe without any of the methods."""
    first = next((trial for trial in methods.trials if trial.role == "baseline"), None)
    return first or (trial_of(methods, methods.ladder[0]) if methods.ladder else None)
