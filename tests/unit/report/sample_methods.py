"""Made-up findings about methods: each multiplies time and memory, two interact, and measurements have noise."""

from __future__ import annotations

import math
import random
from itertools import combinations

from tunewise.lab.findings import Cumulative, Effect, Factor, MethodFindings, MethodTrial, SingleEffect
from tunewise.lab.outcome import Interval

EFFECTS = {  # time, memory, loss
    "packing": (0.46, 0.88, 0.0),
    "bf16": (0.70, 0.58, 0.004),
    "chunked loss": (1.02, 0.72, 0.0),
    "checkpointing": (1.29, 0.61, 0.0),
}
MORE = {"accumulation": (1.16, 0.34, 0.0), "attention per document": (0.91, 0.88, 0.0), "lora": (0.84, 0.55, 0.003)}
FIDELITY = {"packing": "exact", "bf16": "rounding", "chunked loss": "exact", "checkpointing": "exact"}
WORDS = {
    "packing": ("padded", "packed"),
    "bf16": ("fp32", "bf16"),
    "chunked loss": ("whole loss", "chunked loss"),
    "checkpointing": ("all kept", "all recomputed"),
}
TIME, MEMORY = 1.02, 372 * 2**20
SYNERGY = 1.09  # packing and bf16 together save less than their product


def interval(middle: float, share: float) -> Interval:
    return Interval(middle=middle, low=middle * (1 - share), high=middle * (1 + share))


def truth(on: tuple[str, ...]) -> tuple[float, float, float]:
    """Seconds, bytes and loss of a combination."""
    effects = [(EFFECTS | MORE).get(name, (0.9, 0.9, 0.0)) for name in on]
    time = TIME * math.prod(effect[0] for effect in effects)
    if "packing" in on and "bf16" in on:
        time *= SYNERGY
    return time, MEMORY * math.prod(effect[1] for effect in effects), 2.043 + sum(effect[2] for effect in effects)


def label(on: tuple[str, ...]) -> str:
    return " + ".join(on) or "baseline"


def trial(on: tuple[str, ...], role: str, noise: random.Random) -> MethodTrial:
    seconds, size, loss = truth(on)
    measured = seconds * math.exp(noise.gauss(0, 0.012))
    predicted = seconds * math.exp(noise.gauss(0, 0.13))
    return MethodTrial(
        label=label(on), on=on, role=role, repeats=3,
        predicted_step_seconds=interval(predicted, 0.25),
        predicted_peak_bytes=round(size * (1 + noise.gauss(0, 0.012))),
        step_seconds=interval(measured, 0.02), tokens_per_second=interval(4900 / measured, 0.02),
        peak_tensor_bytes=round(size), peak_resident_bytes=round(size * 1.12),
        loss=loss + noise.gauss(0, 0.003), loss_error=3e-4 if "bf16" in on else 4e-8,
        gradient_error=6e-3 if "bf16" in on else 8e-7, tolerance=2e-2 if "bf16" in on else 1e-5, outcome="measured",
    )  # fmt: skip


def without_measurement(base: MethodTrial, outcome: str) -> MethodTrial:
    gone = dict.fromkeys(
        ("step_seconds", "tokens_per_second", "peak_tensor_bytes", "peak_resident_bytes", "loss", "loss_error",
         "gradient_error", "tolerance")
    )  # fmt: skip
    return base.model_copy(update={**gone, "outcome": outcome, "repeats": 0})


def many_methods() -> MethodFindings:
    """Seven methods with long names and no factorial: the front is crowded and the ladder long."""
    names = ("packing", "bf16", "chunked loss", *MORE, "checkpointing")
    found = methods(names=names, num_final=6)
    few = tuple(t for t in found.trials if len(t.on) <= 1 or t.label in found.ladder or t.role == "left out")
    why = ("interactions", "the budget does not suffice for a factorial design")
    gone = {"time_effects": (), "memory_effects": (), "residual_time": None, "residual_memory": None}
    front = tuple(t.label for t in few if t.step_seconds and not any(beats(other, t) for other in few))
    return found.model_copy(update={**gone, "trials": few, "front": front, "excluded": (why,)})


def methods(
    names: tuple[str, ...] = tuple(EFFECTS),
    excluded: tuple[tuple[str, str], ...] | None = None,
    has_failures: bool = False,
    num_final: int = 3,
) -> MethodFindings:
    """A full factorial over `names`; the first three make the final recipe, in the order of the ladder."""
    noise = random.Random(3)
    final = names[:num_final]
    roles = {(): "baseline", **{names[: i + 1]: "ladder" for i in range(len(final))}}
    trials = {}
    for size in range(len(names) + 1):
        for on in combinations(names, size):
            role = roles.get(on, "left out" if len(on) == len(final) - 1 and set(on) < set(final) else "factorial")
            trials[label(on)] = trial(on, role, noise)
    if has_failures:
        last, middle = list(trials)[-1], label(("bf16", "checkpointing"))
        trials[last] = without_measurement(trials[last], "no answer for 60 s: killed")
        trials[middle] = without_measurement(trials[middle], "out of memory")
    for name in ("fused optimizer", "int8 weights", "paged 8-bit AdamW"):
        on = (*final, name)
        made = without_measurement(trial(on, "candidate", noise), "not run: predicted to be slower")
        trials[label(on)] = made
    measured = [each for each in trials.values() if each.step_seconds and each.peak_tensor_bytes]
    if excluded is None:
        excluded = (
            ("fused optimizer", "on a CPU it is the same as the plain one"),
            ("fp16", "its gradient differs by 0.31 from the baseline's, and 0.02 is allowed"),
            ("int8 weights", "predicted to be slower and to save no memory at this size"),
        )
    return MethodFindings(
        factors=tuple(factor(name) for name in names), trials=tuple(trials.values()),
        ladder=tuple(label(names[:i]) for i in range(len(final) + 1)),
        single=tuple(single(name, final) for name in names),
        time_effects=effects(names, 0), memory_effects=effects(names, 1), residual_time=1.4, residual_memory=0.6,
        cumulative_time=cumulative(final, 0), cumulative_memory=cumulative(final, 1),
        front=tuple(each.label for each in measured if not any(beats(other, each) for other in measured)),
        excluded=excluded, chosen=label(final),
        sentences=(
            f"{label(final)} reaches the batch in 0.36 s a step against 1.02 s, and in 137 MiB against 372 MiB.",
            "Packing does most of it; checkpointing saves memory that nobody needs here and costs 29 % of the time.",
        ),
    )  # fmt: skip


def factor(name: str) -> Factor:
    off, on = WORDS.get(name, ("off", "on"))
    return Factor.model_validate(
        {"name": name, "off": off, "on": on, "fidelity": FIDELITY.get(name, "learning"),
         "saves_memory_only": name in ("chunked loss", "checkpointing")}
    )  # fmt: skip


def single(name: str, final: tuple[str, ...]) -> SingleEffect:
    rest = tuple(other for other in final if other != name)
    alone, out = truth((name,)), truth(rest)
    base, whole = truth(()), truth(final)
    is_in = name in final
    return SingleEffect(
        name=name, alone_time=interval(alone[0] / base[0], 0.03), alone_memory=interval(alone[1] / base[1], 0.005),
        left_out_time=interval(whole[0] / out[0], 0.03) if is_in else None,
        left_out_memory=interval(whole[1] / out[1], 0.005) if is_in else None, loss_change=alone[2] - base[2],
    )  # fmt: skip


def effects(names: tuple[str, ...], which: int) -> tuple[Effect, ...]:
    noise = random.Random(which)
    found = [Effect(term=name, ratio=interval(EFFECTS.get(name, (0.9, 0.9))[which], 0.02)) for name in names]
    for one, other in combinations(names, 2):
        true = SYNERGY if which == 0 and {one, other} == {"packing", "bf16"} else 1.0
        found.append(Effect(term=f"{one} x {other}", ratio=interval(true * math.exp(noise.gauss(0, 0.008)), 0.02)))
    return tuple(found)


def cumulative(final: tuple[str, ...], which: int) -> Cumulative | None:
    if len(final) < 2:
        return None
    base = truth(())[which]
    parts = math.prod(truth((name,))[which] / base for name in final)
    whole = truth(final)[which] / base
    return Cumulative(product=parts, whole=interval(whole, 0.03), synergy=whole / parts)


def beats(one: MethodTrial, other: MethodTrial) -> bool:
    """Whether `one` is at least as good in time and memory, and better in one of them."""
    mine, theirs = time_and_memory(one), time_and_memory(other)
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def time_and_memory(trial: MethodTrial) -> tuple[float, float]:
    return (trial.step_seconds.middle if trial.step_seconds else math.inf, trial.peak_tensor_bytes or math.inf)
