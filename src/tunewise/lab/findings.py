"""What a study found, as data: everything that the report shows and that a reader may want to compute with.

`findings.json` in the folder of a tuning holds a `Findings`; units are in the names, uncertain numbers are `Interval`s.
"""

from __future__ import annotations

from typing import Any, Literal

from tunewise.lab.cure_findings import CureFindings
from tunewise.lab.outcome import Interval, Point
from tunewise.quality.measured import Measured
from tunewise.quality.verdict import QualityReport
from tunewise.recipe import Value


class Throughput(Value):
    """Micro-batches of one size: `tokens` real tokens in each, on average."""

    micro_batch_size: int
    tokens: float
    seconds: Interval
    tokens_per_second: Interval
    peak_tensor_bytes: int | None


class ThroughputLine(Value):
    """seconds(micro-batch) = t0 + t1 * rows, and bytes = m0 + m1 * rows, least squares."""

    t0_seconds: float
    t1_seconds_per_row: float
    m0_bytes: float | None
    m1_bytes_per_row: float | None
    update_seconds: float | None


class NoiseScale(Value):
    """The gradient noise scale in supervised tokens (McCandlish et al. 2018, arXiv 1812.06162).

    Attributes:
        estimator: "two batches" or "per example".
        tokens: tr(covariance) / |gradient|^2; None when the gradient cannot be told from noise.
        low, high: bootstrap interval, 95 %; high None: unbounded.
        num_batches: global batches it comes from.
    """

    estimator: Literal["two batches", "per example"]
    tokens: float | None
    low: float
    high: float | None
    num_batches: int


class Arm(Value):
    """One training run of the batch study.

    Attributes:
        rung: which round of the halving; 0 is the shortest.
        batch_tokens: supervised tokens a step.
        budget_tokens: supervised tokens of the whole run.
        loss: the last validation loss, nats per supervised token; None when the trial gave none.
        seconds: of its training steps.
        outcome: "measured", "out of memory", or why it failed.
    """

    rung: int
    batch_tokens: int
    learning_rate: float
    beta2: float | None
    seed: int
    budget_tokens: int
    steps: int
    loss: float | None
    seconds: float | None
    tokens_per_second: float | None
    curve: tuple[Point, ...]
    outcome: str


class BatchPoint(Value):
    """One batch size at its best learning rate, at the largest token budget that it was tried with.

    Attributes:
        loss: mean over seeds, with its interval from the noise between seeds.
        run_seconds: predicted time of the whole training at this batch, from its measured speed.
        is_tied: whether it cannot be told from the best.
    """

    batch_tokens: int
    learning_rate: float
    budget_tokens: int
    loss: Interval
    num_seeds: int
    tokens_per_second: float
    run_seconds: float
    is_tied: bool


class BatchFindings(Value):
    """Which batch size gives the best result, and the cheapest one that does as well.

    Attributes:
        documents: records a step that hold the chosen batch, on average.
        seed_noise: standard deviation of the final loss between seeds, nats.
        tie_band: differences up to this many nats are noise.
        critical_batch: tokens; where doubling the batch needs 1.5 times the tokens of a tiny batch or more.
        undecided: batches that the budget could not tell apart from the chosen one, the chosen one included.
        micro_batch_size, num_micro_batches: how the chosen batch passes through the machine.
        micro_batch_reason: why.
        sentences: the answer in words.
    """

    throughput: tuple[Throughput, ...]
    line: ThroughputLine | None
    noise: tuple[NoiseScale, ...]
    arms: tuple[Arm, ...]
    curve: tuple[BatchPoint, ...]
    seed_noise: float | None
    tie_band: float
    critical_batch: Interval | None
    chosen_tokens: int
    documents: float
    learning_rate: float
    beta2: float | None
    undecided: tuple[int, ...]
    micro_batch_size: int
    num_micro_batches: float
    micro_batch_reason: str
    sentences: tuple[str, ...]


class Factor(Value):
    """A method that can be switched on.

    Attributes:
        name: short and unique ("packing").
        off, on: the option in words ("padded", "packed").
        fidelity: what switching it on promises.
        saves_memory_only: whether its only purpose is memory.
    """

    name: str
    off: str
    on: str
    fidelity: Literal["exact", "rounding", "learning"]
    saves_memory_only: bool


class MethodTrial(Value):
    """One combination, predicted and measured.

    Attributes:
        on: names of the factors that are on.
        repeats: how often it was measured.
        step_seconds: of the same global batches in every trial.
        loss: validation loss after equal tokens; None where it was not taken.
        forgetting: rise of the loss on general text over the trial's steps; None where it was not measured.
        loss_error, gradient_error: relative, against the same learning problem in its plain form.
        tolerance: what is allowed for the gradient; None where there is nothing to compare with.
        outcome: "measured", "out of memory", or why it failed.
        role: what it was run for ("baseline", "ladder", "factorial", "left out", "alone", "candidate").
    """

    label: str
    on: tuple[str, ...]
    role: str
    repeats: int
    predicted_step_seconds: Interval | None
    predicted_peak_bytes: int | None
    step_seconds: Interval | None
    tokens_per_second: Interval | None
    peak_tensor_bytes: int | None
    peak_resident_bytes: int | None
    loss: float | None
    forgetting: Measured | None = None
    loss_error: float | None
    gradient_error: float | None
    tolerance: float | None
    outcome: str


class SingleEffect(Value):
    """What one method does, as ratios of with over without: below 1 is faster, or less memory.

    Attributes:
        alone_*: switched on alone over the baseline.
        left_out_*: the final recipe over the final recipe without it; None for what is not in it.
        loss_change: nats at equal tokens, with minus without.
    """

    name: str
    alone_time: Interval | None
    alone_memory: Interval | None
    left_out_time: Interval | None
    left_out_memory: Interval | None
    loss_change: float | None


class Effect(Value):
    """One term of the factorial: `ratio` is what switching on multiplies time (or memory) by.

    For two factors ("packing x bf16") it is what both together have beyond the product of both.
    """

    term: str
    ratio: Interval


class Cumulative(Value):
    """The product of single effects against the measured whole; synergy is whole over product."""

    product: float
    whole: Interval
    synergy: float


class MethodFindings(Value):
    """Which combination reaches the batch most cheaply, and what each method contributed.

    Attributes:
        ladder: labels in `trials`, in the order in which methods were added.
        front: labels that no other beats in time, memory and quality.
        excluded: (label, reason): what the planner, the numerical gate or the budget of forgetting took out.
        time_effects, memory_effects: main effects and interactions.
        residual_time, residual_memory: the design's remaining standard deviation, in per cent.
    """

    factors: tuple[Factor, ...]
    trials: tuple[MethodTrial, ...]
    ladder: tuple[str, ...]
    single: tuple[SingleEffect, ...]
    time_effects: tuple[Effect, ...]
    memory_effects: tuple[Effect, ...]
    residual_time: float | None
    residual_memory: float | None
    cumulative_time: Cumulative | None
    cumulative_memory: Cumulative | None
    front: tuple[str, ...]
    excluded: tuple[tuple[str, str], ...]
    chosen: str
    sentences: tuple[str, ...]


class Contender(Value):
    """One of the two recipes of the confirmation, with fresh seeds; forgetting in nats per token of general text."""

    label: str
    loss: Interval | None
    step_seconds: Interval | None
    tokens_per_second: Interval | None
    peak_tensor_bytes: int | None
    forgetting: Interval | None = None
    outcome: str


class Confirmation(Value):
    """Winner against runner-up: fresh seeds, equal tokens, and the worst batch at full length."""

    winner: Contender
    runner_up: Contender | None
    num_seeds: int
    sentence: str


class TrainingResult(Value):
    """The final training."""

    first_loss: float | None
    best_loss: float | None
    best_step: int | None
    steps: int
    seconds: float
    tokens: int
    peak_memory_bytes: int
    predicted_seconds: Interval | None
    curve: tuple[Point, ...]
    training_curve: tuple[Point, ...]
    saved: str


class Cost(Value):
    """What finding out cost, by part."""

    part: str
    num_trials: int
    num_failed: int
    num_reused: int
    seconds: float


class Elsewhere(Value):
    """What the planner would choose on another machine, for the same batch."""

    machine: str
    label: str
    peak_bytes: int | None
    tokens_per_second: Interval | None
    run_seconds: Interval | None
    change: str


class Findings(Value):
    """Everything that was found.

    Attributes:
        headline: what was chosen and why, in three sentences.
        recipe: the final recipe as plain data; `recipe_yaml` is its text.
        command: repeats the training.
        quality: what the gate says of the result; None without a training, or with `quality: off`.
        cures: what was tried on a model that the gate refused; None where it refused none.
        budget_seconds: what was allowed; None without a limit.
        outcome: "complete", or what is missing and why ("stopped by the user after 12 trials").
    """

    tunewise: str
    date: str
    model: str
    data: str
    num_parameters: int
    num_documents: int
    num_tokens: int
    num_supervised_tokens: int
    longest_document: int
    machine: str
    machine_memory_bytes: int
    price_per_hour: float | None
    headline: tuple[str, ...]
    batch: BatchFindings | None
    methods: MethodFindings | None
    confirmation: Confirmation | None
    training: TrainingResult | None
    quality: QualityReport | None = None
    cures: CureFindings | None = None
    costs: tuple[Cost, ...]
    budget_seconds: float | None
    search_seconds: float
    elsewhere: tuple[Elsewhere, ...]
    recipe: dict[str, Any]
    recipe_yaml: str
    command: str
    outcome: str
    versions: dict[str, str]
