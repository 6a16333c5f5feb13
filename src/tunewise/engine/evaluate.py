"""The validation loss: nats per supervised token over held-out documents, in the same layout as training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tunewise.engine.step import autocast
from tunewise.methods.method import Run
from tunewise.workload.batches import Layout, MicroBatch
from tunewise.workload.corpus import Corpus


def validation_loss(
    run: Run, corpus: Corpus, documents: Sequence[int], layout: Layout, should_stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Return the loss per supervised token over `documents`, or None when `should_stop` cut it short.

    Sums are taken over all tokens before dividing, so `layout` decides about memory and speed only.
    """
    was_training = run.model.training
    run.model.eval()
    try:
        return _mean_loss(run, corpus, documents, layout, should_stop)
    finally:
        run.model.train(was_training)


@torch.no_grad()
def summed_loss(run: Run, batch: MicroBatch) -> Tensor:
    """Return the sum of the cross entropies of one micro-batch's supervised tokens, a scalar on the run's device."""
    on_device = batch.to(run.device)
    run.documents.lengths = on_device.document_lengths
    with autocast(run):
        return run.loss(run, on_device)


def _mean_loss(
    run: Run, corpus: Corpus, documents: Sequence[int], layout: Layout, should_stop: Callable[[], bool]
) -> float | None:
    total = torch.zeros((), dtype=torch.float64)
    num_supervised = 0
    for rows in layout.micro_batches(documents, corpus.lengths):
        if should_stop():
            return None
        batch = layout.build(rows, corpus)
        total += summed_loss(run, batch).double().cpu()
        num_supervised += batch.num_supervised
    return float(total / num_supervised)
