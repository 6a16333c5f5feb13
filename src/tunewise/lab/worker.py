"""What happens inside a trial's process: read the trial, run it, return the measurement.

The tasks use the same parts as training: `engine.assemble`, `engine.train`, `engine.measure`,
`engine.throughput`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.measure import Measuring, middle
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.throughput import Timing
from tunewise.engine.train import Training
from tunewise.lab import corpora
from tunewise.lab.outcome import Gate, Interval, Measurement, MicroBatchTime, Point
from tunewise.lab.trial import Task, Trial
from tunewise.methods.method import Run
from tunewise.quality.base import base_weights
from tunewise.quality.forgetting import change_of, general_losses
from tunewise.quality.general_text import GeneralText
from tunewise.quality.measured import Measured

WARMING_STEPS = 2
"""The first steps of a training are slower: kernels are chosen, memory is fetched."""


def run_trial(trial: dict[str, Any], data_folder: str, folder: str) -> Measurement:
    """Run a trial to its end.

    Args:
        trial: a `Trial` as plain data.
        data_folder: where `corpora.store` put the data.
        folder: the trial's own; what it writes into `folder`/work is removed afterwards.

    Raises:
        TunewiseError: as training does.
    """
    started = time.perf_counter()
    resident_before = psutil.Process().memory_info().rss
    asked = Trial.model_validate(trial)
    plan = settle(asked.read_recipe(), corpora.load(Path(data_folder)))
    general = corpora.load_general(Path(data_folder)) if asked.measures_forgetting else None
    measurement = _TASKS[asked.task](asked, plan, Path(folder), general)
    seconds = time.perf_counter() - started
    resident = max(0, _most_resident_bytes() - resident_before) if plan.device.type == "cpu" else None
    return measurement.model_copy(update={"trial_seconds": seconds, "peak_resident_bytes": resident})


class _Forgetting:
    """The loss on general text before a trial's steps, and what it has risen by after them."""

    def __init__(self, run: Run, text: GeneralText | None) -> None:
        """Measure the base: `run` before its first step."""
        self._run, self._text, self._before = run, text, None
        if text is not None:
            with base_weights(run):
                self._before = general_losses(run, text)

    def now(self) -> Measured | None:
        """Return the rise, nats per token; None where there is no text."""
        if self._text is None or self._before is None:
            return None
        return change_of(self._before, general_losses(self._run, self._text))


def _learn(asked: Trial, plan: Plan, folder: Path, general: GeneralText | None) -> Measurement:
    """Train to the end; nothing is saved, since nobody resumes a trial."""
    recipe = plan.recipe
    every = max(1, plan.num_steps // max(1, asked.evaluations))
    always = {"patience": None, "forgetting_budget": None}  # arms are compared where all of them have learnt the same
    evaluation = recipe.evaluation.model_copy(update={"every": every, "keep_best": False, **always})
    run = assemble(plan_with(plan, recipe.replace(evaluation=evaluation)))
    forgetting = _Forgetting(run, general)
    home = RunFolder(folder / "work")
    home.open()
    entries: list[dict[str, Any]] = []
    training = Training(
        run,
        plan.data.train,
        plan.data.validation,
        plan.num_steps,
        home,
        entries.append,
        saves=False,
        measures_noise=asked.measures_noise,
    )
    training.progress.evaluated_step = 0  # where all arms start is of no interest
    try:
        outcome = training.run()
    finally:
        home.close()
    steps = [entry for entry in entries if entry["event"] == "step"]
    timed = steps[WARMING_STEPS:] or steps
    seconds = middle([entry["seconds"] for entry in timed])
    rates = [entry["tokens"] / entry["seconds"] for entry in timed]
    _, low, high = middle(rates)
    mean_rate = sum(entry["tokens"] for entry in timed) / sum(entry["seconds"] for entry in timed)
    forgotten = forgetting.now()
    per_example = _noise_at_the_end(asked, training) if asked.noise_examples else ()
    return Measurement(
        step_seconds=_interval(*seconds),
        tokens_per_second=Interval(middle=mean_rate, low=min(low, mean_rate), high=max(high, mean_rate)),
        losses=tuple(entry["loss"] for entry in steps),
        curve=_curve(entries),
        loss=training.progress.validation_loss,
        noise_two_batch=tuple(training.noise),
        noise_per_example=per_example,
        forgetting=forgotten,
        steps=outcome.steps,
        supervised_tokens=outcome.supervised_tokens,
        tokens=outcome.tokens,
        training_seconds=sum(entry["seconds"] for entry in steps),
    )


def _measure(asked: Trial, plan: Plan, folder: Path, general: GeneralText | None) -> Measurement:
    """Worst case, first batch, timed steps, validation loss, and what these few steps have made the model forget."""
    del folder
    measuring = Measuring(assemble(plan), plan.data.train, plan.data.validation)
    peak, which = measuring.worst_case()
    forgetting = _Forgetting(measuring.run, general)
    rate = plan.recipe.training.learning_rate
    assert rate is not None, "complete() fills in the learning rate"
    timed = measuring.timed(asked.warm_up, asked.steps, rate)
    loss = measuring.validation_loss(plan.recipe.evaluation.max_documents)
    # Steps hold different documents, so what is robust is the middle of their seconds for each token.
    per_token = middle([seconds / tokens for seconds, tokens in zip(timed.seconds, timed.tokens, strict=True)])
    tokens = sum(timed.tokens) / len(timed.tokens)
    return Measurement(
        step_seconds=_interval(*(each * tokens for each in per_token)),
        tokens_per_second=_interval(1 / per_token[0], 1 / per_token[2], 1 / per_token[1]),
        peak_tensor_bytes=peak,
        worst_case=which,
        gate=None if timed.first is None else Gate(**vars(timed.first)),
        losses=timed.losses,
        loss=loss,
        forgetting=forgetting.now(),
        steps=asked.warm_up + asked.steps,
        supervised_tokens=timed.supervised_tokens,
        tokens=sum(timed.tokens),
        training_seconds=sum(timed.seconds),
    )


def _throughput(asked: Trial, plan: Plan, folder: Path, general: GeneralText | None) -> Measurement:
    """Micro-batches of 1, 2, 4, ... rows, and an update."""
    del folder, general
    timing = Timing(assemble(plan), plan.data.train)
    times = timing.micro_batches(asked.largest)
    update = middle(timing.updates())
    return Measurement(
        micro_batches=tuple(
            MicroBatchTime(
                micro_batch_size=each.micro_batch_size,
                tokens=each.tokens,
                seconds=_interval(*middle(each.seconds)),
                peak_tensor_bytes=each.peak_tensor_bytes,
            )
            for each in times
        ),
        update_seconds=_interval(*update),
    )


def plan_with(plan: Plan, recipe: Any) -> Plan:
    """Return `plan` with a changed recipe."""
    return Plan(recipe, plan.device, plan.config, plan.tokenizer, plan.data, plan.num_steps)


def _noise_at_the_end(asked: Trial, training: Training) -> tuple[Any, ...]:
    measuring = Measuring(training.built, training.corpus, training.validation)
    return tuple(measuring.noise_per_example(asked.noise_examples))


def _curve(entries: list[dict[str, Any]]) -> tuple[Point, ...]:
    """Join evaluations with the tokens that had been learnt by then."""
    learnt, points = 0, []
    for entry in entries:
        if entry["event"] == "step":
            learnt += entry["supervised_tokens"]
        elif entry["event"] == "evaluation":
            points.append(Point(supervised_tokens=learnt, loss=entry["validation_loss"]))
    return tuple(points)


def _interval(middle_: float, low: float, high: float) -> Interval:
    return Interval(middle=middle_, low=low, high=high)


def _most_resident_bytes() -> int:
    """Return the most that this process has held in memory (Linux: VmHWM), or what it holds now."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        resident: int = psutil.Process().memory_info().rss
        return resident


_TASKS: dict[Task, Callable[[Trial, Plan, Path, GeneralText | None], Measurement]] = {
    "learn": _learn,
    "measure": _measure,
    "throughput": _throughput,
}
