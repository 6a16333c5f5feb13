"""How the time of a micro-batch grows with its rows: t0 + t1 * rows, measured; and what an update takes.

Rows are those that training would make of the first steps' documents, so they are as full and as uneven as in training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tunewise.engine.allocator import peak_tensor_bytes
from tunewise.engine.step import (
    clipped_norm,
    gradients,
    is_out_of_memory,
    parameter_groups,
    set_learning_rate,
    update,
)
from tunewise.methods.method import Run
from tunewise.workload.batches import GlobalBatches, MicroBatch
from tunewise.workload.corpus import Corpus

WARM_UP = 1
TIMED = 2
"""Micro-batches of each size."""

UPDATES = 5


@dataclass(frozen=True)
class MicroBatchSeconds:
    """Seconds of each timed micro-batch of one size, the real tokens in one on average, and the peak of memory."""

    micro_batch_size: int
    tokens: float
    seconds: tuple[float, ...]
    peak_tensor_bytes: int


class Timing:
    """A run whose micro-batches and updates are timed; nothing is learnt (the learning rate is zero)."""

    def __init__(self, run: Run, train: Corpus) -> None:
        self.run, self.train = run, train
        self.optimizer = run.make_optimizer(parameter_groups(run))
        set_learning_rate(self.optimizer, 0.0)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.use_grad_scaler)

    def micro_batches(self, largest: int) -> list[MicroBatchSeconds]:
        """Time micro-batches of 1, 2, 4, ... rows up to `largest`, or up to where memory runs out."""
        found: list[MicroBatchSeconds] = []
        size = 1
        while size <= largest:
            batches = list(self._batches(size, 1 + WARM_UP + TIMED))
            if len(batches) < 1 + WARM_UP + 1:
                break  # the data do not fill so many
            try:
                found.append(self._timed(size, batches))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                break
            size *= 2
        return found

    def updates(self) -> list[float]:
        """Time the clipping and the optimizer's step, after a first one that makes the optimizer's state."""
        seconds = []
        for _ in range(1 + UPDATES):
            for _, parameter in self.run.trainable():
                parameter.grad = torch.zeros_like(parameter)
            self._synchronize()
            started = time.perf_counter()
            clipped_norm(self.run, self.optimizer, self.scaler)
            update(self.run, self.optimizer, self.scaler)
            self._synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds[1:]

    def _timed(self, size: int, batches: list[MicroBatch]) -> MicroBatchSeconds:
        fullest = max(batches, key=lambda batch: batch.input_ids_RL.numel())
        peak = peak_tensor_bytes(self.run, self.optimizer, [fullest], lambda: self._pass(fullest))
        self.optimizer.zero_grad(set_to_none=True)
        rest = [batch for batch in batches if batch is not fullest]
        seconds = []
        for batch in rest:
            self._synchronize()
            started = time.perf_counter()
            self._pass(batch)
            self._synchronize()
            seconds.append(time.perf_counter() - started)
        self.optimizer.zero_grad(set_to_none=True)
        timed = rest[WARM_UP:]
        tokens = sum(batch.num_tokens for batch in timed) / len(timed)
        return MicroBatchSeconds(size, tokens, tuple(seconds[WARM_UP:]), peak)

    def _pass(self, batch: MicroBatch) -> None:
        gradients(self.run, [batch], max(1, batch.num_supervised), self.scaler)

    def _batches(self, size: int, count: int) -> Iterator[MicroBatch]:
        """Yield up to `count` full micro-batches of `size` rows, made of the documents of the first steps."""
        layout = replace(self.run.layout, micro_batch_size=size)
        steps = GlobalBatches(self.train, self.run.recipe.batch, self.run.recipe.seed).epoch(0)
        documents: list[int] = []
        for step in steps:
            documents += step
            rows = layout.rows(documents, self.train.lengths)
            if len(rows) > size * count or len(documents) >= len(self.train):
                break
        full = [rows for rows in layout.micro_batches(documents, self.train.lengths) if len(rows) == size]
        stride = max(1, len(full) // count)  # long and short rows alike
        for rows in full[::stride][:count]:
            yield layout.build(rows, self.train)

    def _synchronize(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
