"""One global step: the same lines whether it is dry, measured or trained.

    begin_step(...)  what methods change from step to step
    gradients(...)   micro-batches forward and backward, weighted by tokens
    update(...)      clip, learning rate, optimizer step

The loss of a step is the sum of the cross entropies of all its supervised tokens over their number, whatever the
micro-batches: a mean of micro-batch means would weigh tokens in short micro-batches more.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tunewise.engine.noise import NoiseMeter
from tunewise.layers.fp8_lm import FP8LMAdamW
from tunewise.methods.method import ParameterGroup, Run
from tunewise.workload.batches import MicroBatch

OUT_OF_MEMORY_MARKS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
"""What torch writes into a plain RuntimeError when the CPU's memory does not suffice."""


def autocast(run: Run) -> AbstractContextManager[object]:
    """Return the autocast region that the run's precision asks for, or nothing."""
    if run.autocast_dtype is None:
        return nullcontext()
    return torch.autocast(run.device.type, dtype=run.autocast_dtype)


def begin_step(run: Run, step: int, num_steps: int | None = None) -> None:
    """Let methods prepare step number `step` of `num_steps`, as far as that is known; see `Companion`."""
    for companion in run.companions.values():
        companion.begin_step(step, num_steps)


def gradients(
    run: Run,
    batches: Iterable[MicroBatch],
    num_supervised: int,
    scaler: torch.amp.GradScaler,
    meter: NoiseMeter | None = None,
) -> Tensor:
    """Add the gradients of one global step to the parameters and return its loss (nats per supervised token).

    Where a method minimises more than the loss (`run.objective`), that is what is returned.

    Args:
        run: the run; its model is in training mode.
        batches: the micro-batches of the step, made one after another.
        num_supervised: supervised tokens of the whole step, over all its micro-batches.
        scaler: fp16's loss scaler; one that is disabled changes nothing.
        meter: looks at what each micro-batch adds to the gradients, where somebody wants to know their noise.
    """
    if meter is not None:
        meter.start()
    total = torch.zeros((), dtype=torch.float32, device=run.device)
    for batch in batches:
        on_device = batch.to(run.device)
        run.documents.lengths = on_device.document_lengths
        with autocast(run), run.saved_tensors():
            loss = (run.objective or run.loss)(run, on_device) / num_supervised
        total += loss.detach()
        for penalty in run.penalties:  # by shares, so that any split into micro-batches adds it once
            loss = loss + penalty() * (batch.num_supervised / num_supervised)
        scaler.scale(loss).backward()
        if meter is not None:
            meter.after_micro_batch(batch.num_supervised)
    return total


def parameter_groups(run: Run) -> list[ParameterGroup]:
    """Sort the trainable parameters into groups of equal weight decay and learning rate factor.

    Vectors (norms, biases) are not decayed; the group's "lr" is filled in before each step.
    """
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter in run.trainable():
        decay = run.recipe.training.weight_decay if parameter.ndim >= 2 else 0.0
        factor = run.learning_rate_factors.get(name, 1.0)
        empty: ParameterGroup = {"params": [], "weight_decay": decay, "learning_rate_factor": factor, "lr": 0.0}
        groups.setdefault((decay, factor), empty)["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group its share of `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_factor"]


def clipped_norm(run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Tensor:
    """Return the norm of all gradients together, after scaling them down to the recipe's `max_grad_norm`."""
    if isinstance(optimizer, FP8LMAdamW) and optimizer.stored_gradients is not None:
        return optimizer.clip_gradients(run.recipe.training.max_grad_norm)
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    parameters = [parameter for _, parameter in run.trainable() if parameter.grad is not None]
    limit = run.recipe.training.max_grad_norm
    if limit is None:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return torch.nn.utils.clip_grad_norm_(parameters, limit)


def update(run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Let the optimizer make its step, methods look at the gradients, and drop them."""
    scaler.step(optimizer)
    scaler.update()
    for companion in run.companions.values():
        companion.after_update()
    optimizer.zero_grad(set_to_none=True)


def update_in_backward(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Let each parameter be updated as soon as its gradient is complete, and free the gradient.

    Lv et al. 2023 (LOMO), arXiv 2306.09782: at no time are all gradients in memory. One optimizer serves all: at the
    moment of the hook the only gradient that exists is this parameter's, and torch's optimizers skip the others.
    """

    def step(parameter: Tensor) -> None:
        del parameter
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _, parameter in run.trainable():
        parameter.register_post_accumulate_grad_hook(step)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` is the machine's memory running out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in OUT_OF_MEMORY_MARKS)
