"""How long a run is, and its learning rate as a factor on the peak: a pure function of the step.

References:
    "wsd" (warm-up, stable, decay): Hu et al. 2024, MiniCPM, arXiv 2404.06395; the decay takes the last fifth.
    "inverse_sqrt": Vaswani et al. 2017, section 5.3.
"""

from __future__ import annotations

import math

from tunewise.recipe import TrainingSpec
from tunewise.workload.batches import GlobalBatches

WSD_DECAY = 0.2
"""The share of the run over which "wsd" decays."""


def total_steps(batches: GlobalBatches, spec: TrainingSpec) -> int:
    """Return the number of optimizer steps of a run that ends as `spec` says; a part of an epoch is rounded."""
    if spec.steps is not None:
        return spec.steps
    if spec.tokens is not None:
        return _steps_for_tokens(batches, spec.tokens)
    epochs = spec.epochs or 1.0
    whole = int(epochs)
    total = sum(len(batches.epoch(number)) for number in range(whole))
    return max(1, total + round((epochs - whole) * len(batches.epoch(whole))))


def _steps_for_tokens(batches: GlobalBatches, tokens: int) -> int:
    held, counts = 0, batches.corpus.num_supervised
    for step, (_, documents) in enumerate(batches.from_step(0), start=1):
        held += int(counts[documents].sum())
        if held >= tokens:
            return step
    raise AssertionError("from_step never ends")


def warmup_steps(spec: TrainingSpec, total_steps: int) -> int:
    """Return how many steps the learning rate rises; `spec.warmup` below 1 is a share of the run, else a count."""
    return math.ceil(spec.warmup * total_steps) if spec.warmup < 1 else int(spec.warmup)


def learning_rate_factor(spec: TrainingSpec, step: int, total_steps: int) -> float:
    """Return the factor on the peak learning rate in step `step` (from 0) of `total_steps`.

    It rises linearly to 1 during warm-up (step 0 already learns) and then follows `spec.schedule` down to
    `spec.final_learning_rate`, which it would reach one step after the last.
    """
    warmup = warmup_steps(spec, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = spec.final_learning_rate
    match spec.schedule:
        case "constant":
            return 1.0
        case "linear":
            return floor + (1 - floor) * (1 - done)
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
        case "wsd":
            return floor + (1 - floor) * min(1.0, (1 - done) / WSD_DECAY)
        case "inverse_sqrt":
            return max(floor, math.sqrt(max(1, warmup) / max(1, step)))
