"""What each method contributed: alone, on the ladder, left out, in interaction, and all of them together."""

from __future__ import annotations

import math
import statistics

from tunewise.lab.effects import cumulative
from tunewise.lab.findings import Cumulative, MethodFindings, MethodTrial, SingleEffect
from tunewise.lab.method_study import NARROW, MethodStudy
from tunewise.lab.outcome import Failed, Interval, Measurement, OutOfMemory, speed_of
from tunewise.lab.tried import Tried
from tunewise.units import format_bytes, format_seconds


def method_findings(study: MethodStudy) -> MethodFindings:
    """Return what a finished study of the methods found."""
    space = study.space
    time, memory = _cumulative(study, "time"), _cumulative(study, "memory")
    return MethodFindings(
        factors=space.factors,
        trials=(*(_trial(study, tried) for tried in study.tried.values()), *_beyond(study)),
        ladder=tuple(space.label(on) for on in study.ladder),
        single=tuple(_single(study, name) for name in space.names),
        time_effects=study.model_time.effects if study.model_time else (),
        memory_effects=study.model_memory.effects if study.model_memory else (),
        residual_time=study.model_time.residual_percent if study.model_time else None,
        residual_memory=study.model_memory.residual_percent if study.model_memory else None,
        cumulative_time=time,
        cumulative_memory=memory,
        front=tuple(space.label(tried.on) for tried in _front(study)),
        excluded=tuple(study.excluded),
        chosen=space.label(study.winner),
        sentences=tuple(_sentences(study, time, memory)),
    )


def _trial(study: MethodStudy, tried: Tried) -> MethodTrial:
    last = tried.measured[-1] if tried.measured else None
    resident = [m.peak_resident_bytes for m in tried.measured if m.peak_resident_bytes is not None]
    gate = tried.gate
    shown = tried.on in {*study.ladder, study.winner, study.runner_up}
    prediction = study.predicted(tried.on) if shown else None
    seconds = prediction.step_seconds if prediction else None
    return MethodTrial(
        label=study.space.label(tried.on),
        on=tuple(name for name in study.space.names if name in tried.on),
        role=tried.role,
        repeats=len(tried.measured),
        predicted_step_seconds=Interval(middle=seconds.middle, low=seconds.low, high=seconds.high) if seconds else None,
        predicted_peak_bytes=prediction.peak_bytes if prediction else None,
        step_seconds=seconds_of(tried),
        tokens_per_second=speed_of(tried.measured),
        peak_tensor_bytes=None if math.isinf(tried.peak_bytes) else int(tried.peak_bytes),
        peak_resident_bytes=max(resident, default=None),
        loss=last.loss if last else None,
        forgetting=tried.forgetting,
        loss_error=gate.loss_error if gate else None,
        gradient_error=gate.gradient_error if gate else None,
        tolerance=gate.gradient_tolerance if gate else None,
        outcome=_outcome(tried),
    )


def _beyond(study: MethodStudy) -> list[MethodTrial]:
    """The winner with products in 8 bits, as one more trial."""
    if study.beyond is None:
        return []
    trial = _trial(study, study.beyond)
    plain = {"predicted_step_seconds": None, "predicted_peak_bytes": None}  # those are the winner's
    return [trial.model_copy(update={"label": f"{trial.label} + {NARROW}", **plain})]


def _outcome(tried: Tried) -> str:
    if tried.measured:
        return "measured"
    first = tried.outcomes[0]
    return "out of memory" if isinstance(first, OutOfMemory) else _reason(first)


def _reason(outcome: Measurement | OutOfMemory | Failed) -> str:
    return "measured" if isinstance(outcome, Measurement) else outcome.reason


def seconds_of(tried: Tried) -> Interval | None:
    """Return a combination's seconds of a step: the median over repetitions, with the widest quartiles seen."""
    steps = [m.step_seconds for m in tried.measured if m.step_seconds is not None]
    if not steps:
        return None
    middles = [step.middle for step in steps]
    return Interval(
        middle=statistics.median(middles),
        low=min(min(step.low for step in steps), min(middles)),
        high=max(max(step.high for step in steps), max(middles)) if len(steps) == 1 else max(middles),
    )


def _single(study: MethodStudy, name: str) -> SingleEffect:
    alone_on = study.closed(frozenset({name}))
    alone, without = study.tried.get(alone_on), study.tried.get(alone_on - {name})
    winner, left_out = study.tried.get(study.winner), study.tried.get(study.winner - {name})
    is_in = name in study.winner
    return SingleEffect(
        name=name,
        alone_time=_ratio(alone, without, "time"),
        alone_memory=_ratio(alone, without, "memory"),
        left_out_time=_ratio(winner, left_out, "time") if is_in else None,
        left_out_memory=_ratio(winner, left_out, "memory") if is_in else None,
        loss_change=_loss_change(alone, without),
    )


def _ratio(first: Tried | None, second: Tried | None, what: str) -> Interval | None:
    """Return the first one's time (or memory) over the second one's."""
    if first is None or second is None or not first.measured or not second.measured:
        return None
    if what == "memory":
        ratio = first.peak_bytes / second.peak_bytes
        return Interval(middle=ratio, low=ratio, high=ratio) if math.isfinite(ratio) else None
    one, other = seconds_of(first), seconds_of(second)
    if one is None or other is None:
        return None
    return Interval(middle=one.middle / other.middle, low=one.low / other.high, high=one.high / other.low)


def _loss_change(first: Tried | None, second: Tried | None) -> float | None:
    if first is None or second is None or not first.measured or not second.measured:
        return None
    one, other = first.measured[0].loss, second.measured[0].loss
    return None if one is None or other is None else one - other


def _cumulative(study: MethodStudy, what: str) -> Cumulative | None:
    """The product of what the winner's methods do alone, against the winner over the baseline."""
    whole = _ratio(study.tried.get(study.winner), study.tried.get(frozenset()), what)
    singles = [_single(study, name) for name in study.space.names if name in study.winner]
    ratios = [each.alone_time if what == "time" else each.alone_memory for each in singles]
    known = [ratio.middle for ratio in ratios if ratio is not None]
    if whole is None or len(known) != len(ratios) or not known:
        return None
    return cumulative(known, whole)


def _front(study: MethodStudy) -> list[Tried]:
    """Combinations of the user's learning problem that no other sound one beats in time and memory."""
    sound = [t for t in study.tried.values() if t.is_sound and study.keeps_what_is_learnt(t.on)]
    sound = [t for t in sound if not t.forgets_more_than(study.max_forgetting)] or sound

    def is_beaten(one: Tried) -> bool:
        return any(
            other.seconds <= one.seconds
            and other.peak_bytes <= one.peak_bytes
            and (other.seconds, other.peak_bytes) != (one.seconds, one.peak_bytes)
            for other in sound
        )

    return sorted((one for one in sound if not is_beaten(one)), key=lambda tried: tried.seconds)


def _sentences(study: MethodStudy, time: Cumulative | None, memory: Cumulative | None) -> list[str]:
    winner, baseline = study.tried.get(study.winner), study.tried.get(frozenset())
    if winner is None or not winner.measured:
        return ["No combination of methods could be measured."]
    said = [
        f"{study.space.label(study.winner)}: {format_seconds(winner.seconds)} a step and "
        f"{format_bytes(winner.peak_bytes)} of tensors."
    ]
    if baseline is not None and baseline.measured and time is not None and memory is not None:
        said.append(
            f"Against the baseline that is {1 / time.whole.middle:.2f} times as fast with "
            f"{memory.whole.middle:.2f} times the memory; the product of the single effects would have been "
            f"{1 / time.product:.2f} times as fast (synergy {1 / time.synergy:.2f})."
        )
    one, other = (_loss_of(tried) for tried in (winner, baseline))
    if one is not None and other is not None:
        said.append(
            f"Validation loss after the same {winner.measured[0].supervised_tokens} tokens: {one:.4f} against "
            f"{other:.4f} of the baseline."
        )
    if winner.forgetting is not None:
        steps = study.warm_up + study.steps
        said.append(
            f"In its {steps} steps the loss on general text changed by {winner.forgetting.middle:+.4f} nats a token "
            f"({winner.forgetting.low:+.4f} to {winner.forgetting.high:+.4f})."
        )
    if winner.forgets_more_than(study.max_forgetting):
        said.append("No combination that was tried keeps within the budget of forgetting: what is learnt costs it.")
    spared = [
        factor.name
        for factor in study.space.factors
        if factor.saves_memory_only and factor.fidelity != "learning" and factor.name not in study.winner
    ]
    if spared:
        said.append(f"It fits without {' and '.join(spared)}, so it does without.")
    return [*said, *_of_narrow_products(study, winner)]


def _of_narrow_products(study: MethodStudy, winner: Tried) -> list[str]:
    beyond, narrow = study.beyond, study.space.narrow
    if beyond is None or narrow is None or not beyond.measured:
        return []
    head = f", head_compute: {narrow.head_compute}" if narrow.head_compute != "dense" else ""
    one, other = (_loss_of(tried) for tried in (beyond, winner))
    learnt = "" if one is None or other is None else f"; the validation loss changes by {one - other:+.4f} nats"
    return [
        f"With {NARROW} besides (quantize: {{kind: {narrow.kind}, compute: {narrow.compute}{head}}}) a step takes "
        f"{beyond.seconds / winner.seconds:.2f} times as long, with {beyond.peak_bytes / winner.peak_bytes:.2f} times "
        f"the memory{learnt}. It learns over a coarser base, so it is yours to add."
    ]


def _loss_of(tried: Tried | None) -> float | None:
    return tried.measured[0].loss if tried is not None and tried.measured else None
