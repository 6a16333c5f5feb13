"""The Run for a few steps, alone: worst-case memory, seconds of a step, the first batch's loss and gradient.

    worst case    the longest documents through forward, backward, update and evaluation, for memory
    steps         the first global batches of the first epoch: warm-up, then timed ones; the very first one's loss and
                  gradient are kept, to compare methods by

The steps are those of training (`engine.step`). Memory comes first, with a learning rate of zero, so that what does
not fit shows at once and what is learnt in the timed steps does not depend on it.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tunewise.engine.allocator import peak_tensor_bytes
from tunewise.engine.evaluate import summed_loss, validation_loss
from tunewise.engine.noise import NoiseMeter
from tunewise.engine.noise_sums import NoiseSums
from tunewise.engine.sketch import sketch
from tunewise.engine.step import (
    begin_step,
    clipped_norm,
    gradients,
    parameter_groups,
    set_learning_rate,
    update,
    update_in_backward,
)
from tunewise.layers.fp8_lm import stored_gradients_of
from tunewise.methods.method import Run
from tunewise.workload.batches import GlobalBatches, Layout, MicroBatch, Row
from tunewise.workload.corpus import Corpus

SAMPLED_STEPS = 256
"""Steps that are laid out to find the largest micro-batches; a step costs well under a millisecond."""

SKETCH_WIDTH = 2048
"""Numbers of a gradient's sketch; a relative error is then known to about 3 % of itself."""


@dataclass(frozen=True)
class FirstBatch:
    """The first global batch before anything is learnt: loss, norm and sketch of the gradient, what is trained."""

    loss: float
    norm: float
    sketch: tuple[float, ...]
    trainable: str


@dataclass(frozen=True)
class TimedSteps:
    """Steps after warming up: seconds and tokens of each timed one; losses, and the first batch, of all.

    `first` is None where updates in backward leave no gradient to look at.
    """

    seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    supervised_tokens: int
    losses: tuple[float, ...]
    first: FirstBatch | None


class Measuring:
    """A run, its data and its optimizer, for measurements; use each part once, in the order of the module's text."""

    def __init__(self, run: Run, train: Corpus, validation: Corpus) -> None:
        self.run, self.train, self.validation = run, train, validation
        recipe = run.recipe
        self.steps = GlobalBatches(train, recipe.batch, recipe.seed)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.use_grad_scaler)
        self.optimizer = run.make_optimizer(parameter_groups(run))
        self._num_steps = 0
        if run.update_in_backward:
            update_in_backward(run, self.optimizer)

    def worst_case(self) -> tuple[int, str]:
        """Return (peak bytes of tensors, which batch that was) of the fullest step, its update and its evaluation."""
        run = self.run
        batches = self._fullest(self.train, run.layout)
        fullest_evaluation = self._fullest(self.validation, self._evaluation_layout()) if len(self.validation) else []
        self._make_state()
        num_supervised = max(1, sum(batch.num_supervised for batch in batches))

        def work() -> None:
            gradients(run, iter(batches), num_supervised, self.scaler)
            self._update()
            if fullest_evaluation:
                run.model.eval()
                summed_loss(run, fullest_evaluation[0]).double()
                run.model.train()

        peak = peak_tensor_bytes(run, self.optimizer, batches, work)
        rows, width = batches[0].input_ids_RL.shape
        if not run.update_in_backward:  # what the zero updates have left in the optimizer's state is not of this run
            self.optimizer = run.make_optimizer(parameter_groups(run))
            self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.use_grad_scaler)
            self._num_steps = 0
            for companion in run.companions.values():
                companion.restore({})
        return peak, f"{rows} x {width} tokens, {'two micro-batches' if len(batches) > 1 else 'one micro-batch'}"

    def timed(self, warm_up: int, count: int, learning_rate: float) -> TimedSteps:
        """Do `warm_up` + `count` steps of training and time the latter; the very first one is also looked at.

        Args:
            warm_up, count: numbers of global batches, taken in the order in which training takes them; at least 1.
            learning_rate: of every step; the loss after equal tokens is compared, so it is no part of a schedule.
        """
        set_learning_rate(self.optimizer, learning_rate)
        steps = self._documents(warm_up + count)
        first, loss = self._first_step(steps[0])
        seconds, losses, tokens = [], [loss], []
        for number, documents in enumerate(steps[1:], start=1):
            self._synchronize()
            started = time.perf_counter()
            losses.append(self._step(documents))
            self._synchronize()
            if number >= warm_up:
                seconds.append(time.perf_counter() - started)
                tokens.append(int(self.train.lengths[documents].sum()))
        supervised = sum(self._supervised(documents) for documents in steps)
        return TimedSteps(tuple(seconds), tuple(tokens), supervised, tuple(losses), first)

    def validation_loss(self, max_documents: int) -> float | None:
        """Return the validation loss, None without validation documents."""
        documents = list(range(min(len(self.validation), max_documents)))
        if not documents:
            return None
        return validation_loss(self.run, self.validation, documents, self._evaluation_layout())

    def noise_per_example(self, num_batches: int) -> list[NoiseSums]:
        """Return the noise of `num_batches` global batches, from their documents one by one; nothing is learnt."""
        meter = NoiseMeter(parameter for _, parameter in self.run.trainable())
        plain, alone, found = torch.amp.GradScaler(enabled=False), Layout(1), []
        for documents in self._documents(num_batches):
            learnt = [d for d in documents if self.train.num_supervised[d]]
            batches = (alone.build([(document,)], self.train) for document in learnt)
            gradients(self.run, batches, self._supervised(learnt), plain, meter)
            sums = meter.per_example(self._supervised(learnt))
            found += [] if sums is None else [sums]
            self.optimizer.zero_grad(set_to_none=True)
        return found

    def _first_step(self, documents: Sequence[int]) -> tuple[FirstBatch | None, float]:
        """The first step without dropout; its gradient is kept as a sketch before the optimizer uses it."""
        begin_step(self.run, self._num_steps)
        with _without_dropout(self.run.model):
            loss = float(gradients(self.run, self._micro_batches(documents), self._supervised(documents), self.scaler))
        is_gone = self.run.update_in_backward or stored_gradients_of(self.optimizer) is not None
        first = None if is_gone else self._first_batch(loss)
        self._update()
        return first, loss

    def _first_batch(self, loss: float) -> FirstBatch:
        named = list(self.run.trainable())
        scale = self.scaler.get_scale()
        content = "".join(f"{name} {tuple(parameter.shape)}\n" for name, parameter in sorted(named, key=lambda n: n[0]))
        numbers = [value / scale for value in sketch(named, width=SKETCH_WIDTH)]
        squares = sum(float(p.grad.double().square().sum()) for _, p in named if p.grad is not None)
        return FirstBatch(
            loss=loss,
            norm=squares**0.5 / scale,
            sketch=tuple(float(f"{number:.7g}") for number in numbers),
            trainable=hashlib.sha256(content.encode()).hexdigest()[:16],
        )

    def _step(self, documents: Sequence[int]) -> float:
        """The lines of `engine.train.Training._step` that compute."""
        begin_step(self.run, self._num_steps)
        loss = float(gradients(self.run, self._micro_batches(documents), self._supervised(documents), self.scaler))
        self._update()
        return loss

    def _update(self) -> None:
        if not self.run.update_in_backward:
            clipped_norm(self.run, self.optimizer, self.scaler)
            update(self.run, self.optimizer, self.scaler)
            self._num_steps += 1

    def _documents(self, count: int) -> list[list[int]]:
        taken = self.steps.from_step(0)
        return [next(taken)[1] for _ in range(count)]

    def _supervised(self, documents: Sequence[int]) -> int:
        return int(self.train.num_supervised[list(documents)].sum())

    def _micro_batches(self, documents: Sequence[int]) -> Iterator[MicroBatch]:
        for rows in self.run.layout.micro_batches(documents, self.train.lengths):
            yield self.run.layout.build(rows, self.train)

    def _evaluation_layout(self) -> Layout:
        layout, size = self.run.layout, self.run.recipe.evaluation.micro_batch_size
        return Layout(size or layout.micro_batch_size, layout.row_tokens, layout.pad_to)

    def _fullest(self, corpus: Corpus, layout: Layout) -> list[MicroBatch]:
        """The two largest micro-batches of an epoch and of the longest documents; more need no more memory."""
        steps = GlobalBatches(corpus, self.run.recipe.batch, self.run.recipe.seed).epoch(0)
        count = max(len(documents) for documents in steps[:SAMPLED_STEPS])
        longest = [int(index) for index in np.argsort(-corpus.lengths, kind="stable")[:count]]
        found = [
            rows for step in (longest, *steps[:SAMPLED_STEPS]) for rows in layout.micro_batches(step, corpus.lengths)
        ]

        def size(rows: list[Row]) -> tuple[int, int]:
            held = [int(corpus.lengths[list(row)].sum()) for row in rows]
            return len(rows) * max(held), int(max(corpus.lengths[document] for row in rows for document in row))

        accumulates = any(len(layout.micro_batches(step, corpus.lengths)) > 1 for step in steps[:SAMPLED_STEPS])
        return [layout.build(rows, corpus) for rows in sorted(found, key=size, reverse=True)[: 1 + accumulates]]

    def _make_state(self) -> None:
        """An update by nothing, so that the worst step finds the optimizer's state that all but the first one find."""
        set_learning_rate(self.optimizer, 0.0)
        if self.run.update_in_backward:
            return  # its hooks update while gradients come, the state included
        for _, parameter in self.run.trainable():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for companion in self.run.companions.values():
            companion.after_update()
        self.optimizer.zero_grad(set_to_none=True)

    def _synchronize(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (median, lower quartile, upper quartile); of one value, three times that."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


_SHARES_DROPPED = ("p", "dropout", "attention_dropout")
"""Attributes in which layers keep the probability of dropping a unit."""


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Let no unit be dropped: what is dropped depends on how documents lie in rows."""
    shares = [
        (module, name, value)
        for module in model.modules()
        for name in _SHARES_DROPPED
        if isinstance(value := vars(module).get(name), float)
    ]
    for module, name, _ in shares:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in shares:
            setattr(module, name, value)
