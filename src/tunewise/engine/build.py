"""Recipe + model + device -> Run: the recipe's methods change the run slot by slot, and what results is checked."""

from __future__ import annotations

import torch
from torch import nn

from tunewise.errors import Conflict
from tunewise.methods.compatibility import refuse_conflicts
from tunewise.methods.method import ParameterGroup, Run
from tunewise.methods.precision import check_dtypes
from tunewise.recipe import Recipe, Slot
from tunewise.workload.batches import Layout, MicroBatch

REQUIRED_SLOTS = (Slot.PRECISION, Slot.ATTENTION, Slot.LOSS, Slot.OPTIMIZER)


def build(recipe: Recipe, model: nn.Module, device: torch.device, *, is_dry: bool = False) -> Run:
    """Return the run of a complete recipe around `model`, which holds the base weights on the CPU (or fake ones).

    Raises:
        Conflict: the recipe's methods contradict each other, this model or this device.
    """
    refuse_conflicts(recipe)
    if recipe.batch.micro_batch_size is None or not all(recipe.in_slot(slot) for slot in REQUIRED_SLOTS):
        raise ValueError("the recipe is not complete; pass it through tunewise.methods.complete first")
    run = Run(
        recipe=recipe,
        device=device,
        model=model,
        layout=Layout(micro_batch_size=recipe.batch.micro_batch_size),
        loss=_no_loss,
        make_optimizer=_no_optimizer,
        is_dry=is_dry,
    )
    if recipe.in_slot(Slot.ADAPTER):
        model.requires_grad_(False)
    for slot in Slot:
        if slot == Slot.ADAPTER:
            _settle_weights(run)
        for method in recipe.in_slot(slot):
            method.apply(run)
    _settle_weights(run)
    run.model.train()
    if not any(True for _ in run.trainable()):
        raise Conflict("Nothing is learnt: no parameter is trainable. Add an adapter, or leave quantization out.")
    check_dtypes(run)
    return run


def _settle_weights(run: Run) -> None:
    """Put weights where they belong: on the device, or those of streamed blocks where they wait.

    Fake tensors are where they should be from the start.
    """
    if run.streamer is not None:
        run.streamer.settle(run.model)
    elif not run.is_dry:
        run.model.to(run.device)


def _no_loss(run: Run, batch: MicroBatch) -> torch.Tensor:
    raise AssertionError("a method of the slot LOSS sets the loss")


def _no_optimizer(groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    raise AssertionError("a method of the slot OPTIMIZER sets the optimizer")
