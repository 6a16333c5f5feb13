"""A Run for tests of single methods, without the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.methods.method import Run
from tunewise.recipe import DataSpec, Method, ModelSpec, Recipe
from tunewise.workload.batches import Layout, MicroBatch


def make_recipe(*methods: Method, **changes: Any) -> Recipe:
    """Return a recipe with these methods."""
    return Recipe(model=ModelSpec(name="tiny"), data=DataSpec(source="tiny.jsonl"), methods=methods, **changes)


def make_run(model: nn.Module, *methods: Method, device: str = "cpu", is_dry: bool = False, **changes: Any) -> Run:
    """Return a run around `model` to which `methods` are applied in the order of their slots."""
    recipe = make_recipe(*methods, **changes)
    run = Run(
        recipe=recipe,
        device=torch.device(device),
        model=model,
        layout=Layout(micro_batch_size=4),
        loss=_no_loss,
        make_optimizer=_missing,
        is_dry=is_dry,
    )
    for method in recipe.methods or ():
        method.apply(run)
    return run


def loss_of(run: Run, batch: MicroBatch) -> Callable[[], Tensor]:
    """Return a function that computes the run's loss as the engine does."""

    def compute() -> Tensor:
        run.documents.lengths = batch.document_lengths
        with torch.autocast(run.device.type, run.autocast_dtype, enabled=run.autocast_dtype is not None):
            return run.loss(run, batch)

    return compute


def _no_loss(run: Run, batch: MicroBatch) -> Tensor:
    raise AssertionError("no method has set the loss")


def _missing(*arguments: Any) -> Any:
    raise AssertionError(f"no method has set this: {arguments}")
