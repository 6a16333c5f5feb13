"""What came of a trial: a `Measurement`, or that memory ran out, or that it failed.

Running out of memory, a crash and a time-out are outcomes, not exceptions: a study records them and goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from tunewise.engine.noise_sums import NoiseSums
from tunewise.quality.measured import Measured
from tunewise.quality.verdict import QualityReport
from tunewise.recipe import Value


class Interval(Value):
    """A quantity with its interval (95 % where nothing else is said)."""

    middle: float
    low: float
    high: float


class Point(Value):
    """One point of a loss curve."""

    supervised_tokens: int
    loss: float


class MicroBatchTime(Value):
    """Forward and backward of micro-batches of one size.

    Attributes:
        tokens: real tokens in one, on average.
        seconds: of one, median and quartiles.
        peak_tensor_bytes: the most that torch's allocator held.
    """

    micro_batch_size: int
    tokens: float
    seconds: Interval
    peak_tensor_bytes: int


class Gate(Value):
    """A trial's first global batch, by which its numbers are compared with another's.

    Attributes:
        loss: nats per supervised token.
        norm: of the whole gradient.
        sketch: a CountSketch of the gradient (`engine.sketch`), linear in it.
        trainable: a hash of the names and shapes of what is trained; only equal ones can be compared.
    """

    loss: float
    norm: float
    sketch: tuple[float, ...]
    trainable: str


class JudgedState(Value):
    """One state of a model, held against the base that it came from.

    Attributes:
        name: which ("replay-5", "scale-0.5", "average-3").
        gain: fall of the loss on held-out documents, nats per supervised token.
        forgetting: rise of the loss on general text, nats per token; None for a base that was no trained model.
        quality: the gate's report; None where these two alone were measured.
        folder: name of the folder it was saved in, beside those of other cures; "" where it was not.
    """

    name: str
    gain: Measured | None
    forgetting: Measured | None
    quality: QualityReport | None = None
    folder: str = ""


class Measurement(Value):
    """What a trial measured; a field is None where the trial was not asked for it.

    Attributes:
        step_seconds: of a global step: median and quartiles, after warming up.
        tokens_per_second: real tokens, no padding, in these steps.
        peak_tensor_bytes: the most that torch's allocator held in the worst step, its update and its evaluation.
        peak_resident_bytes: on a CPU the most that the process held beyond what it was started with.
        worst_case: which batch that was.
        gate: the first global batch's loss and gradient.
        losses: training loss of each step, nats per supervised token.
        curve: validation loss, by supervised tokens learnt.
        loss: the last validation loss.
        noise_two_batch: for each global batch, from micro-batches against the whole.
        noise_per_example: for each global batch, from its documents one by one.
        micro_batches, update_seconds: throughput by size of the micro-batch, and the optimizer's part of a step.
        forgetting: rise of the loss on general text over the trial's steps, nats per token.
        states: of a "cure" trial, what was judged.
        steps, supervised_tokens, tokens: what was learnt from.
        training_seconds: of all steps, evaluation and start-up not counted.
        trial_seconds: of the whole trial, from its start to its end.
    """

    kind: Literal["measurement"] = "measurement"
    step_seconds: Interval | None = None
    tokens_per_second: Interval | None = None
    peak_tensor_bytes: int | None = None
    peak_resident_bytes: int | None = None
    worst_case: str = ""
    gate: Gate | None = None
    losses: tuple[float, ...] = ()
    curve: tuple[Point, ...] = ()
    loss: float | None = None
    noise_two_batch: tuple[NoiseSums, ...] = ()
    noise_per_example: tuple[NoiseSums, ...] = ()
    micro_batches: tuple[MicroBatchTime, ...] = ()
    update_seconds: Interval | None = None
    forgetting: Measured | None = None
    states: tuple[JudgedState, ...] = ()
    steps: int = 0
    supervised_tokens: int = 0
    tokens: int = 0
    training_seconds: float = 0.0
    trial_seconds: float = 0.0


def speed_of(measured: Sequence[Measurement]) -> Interval | None:
    """Return tokens per second: the median of the repetitions, the lowest and highest bound of any; None: no rate."""
    rates = [each.tokens_per_second for each in measured if each.tokens_per_second is not None]
    if not rates:
        return None
    return Interval(
        middle=statistics.median(rate.middle for rate in rates),
        low=min(rate.low for rate in rates),
        high=max(rate.high for rate in rates),
    )


class OutOfMemory(Value):
    """The trial needed more memory than there is, or than it was allowed."""

    kind: Literal["out_of_memory"] = "out_of_memory"
    reason: str
    log: str = ""
    trial_seconds: float = 0.0


class Failed(Value):
    """The trial ended in another way: an error, a crash of the interpreter, a time-out.

    Attributes:
        reason: one line.
        log: where the trial's output is.
    """

    kind: Literal["failed"] = "failed"
    reason: str
    log: str = ""
    trial_seconds: float = 0.0


Outcome = Annotated[Measurement | OutOfMemory | Failed, Field(discriminator="kind")]

_ADAPTER: TypeAdapter[Measurement | OutOfMemory | Failed] = TypeAdapter(Outcome)


def outcome_from_json(text: str | bytes) -> Measurement | OutOfMemory | Failed:
    """Read an outcome.

    Raises:
        ValueError: the text is no outcome.
    """
    return _ADAPTER.validate_json(text)
