"""What a run must remember to go on bit for bit: progress, weights, optimizer, scaler and random states."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunewise.errors import CheckpointError
from tunewise.methods.method import Run
from tunewise.workload.batches import Layout

_TRAINABLE, _OPTIMIZER, _RANDOM, _COMPANION = "trainable/", "optimizer/", "random/", "companion/"


@dataclass
class Progress:
    """Where a training run stands; all of it is written to a checkpoint's `state.json`.

    Attributes:
        step: optimizer steps done.
        supervised_tokens: tokens learnt from so far.
        tokens: tokens that went through the model so far, padding not counted.
        smoothed_loss: exponential mean of the training loss (decay 0.9), the yardstick for a spike.
        evaluated_step: the step after which the validation loss was last taken, -1 before the first.
        validation_loss: the last validation loss.
        best_loss, best_step: the lowest validation loss after a step of training, and that step.
        evaluations_since_best: for patience.
        first_general_loss, general_loss, best_general_loss: the loss on the general text before training, at the last
            evaluation, and at the best step.
        micro_batch_size, row_tokens: the present layout, smaller than the recipe's after running out of memory.
        evaluation_micro_batch_size, evaluation_row_tokens: the same of evaluation, which shrinks by itself.
        seconds: time spent in training, over all resumptions.
        finished: why training ended, None while it goes on.
    """

    micro_batch_size: int
    row_tokens: int | None
    evaluation_micro_batch_size: int = 1
    evaluation_row_tokens: int | None = None
    step: int = 0
    supervised_tokens: int = 0
    tokens: int = 0
    smoothed_loss: float | None = None
    evaluated_step: int = -1
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    first_general_loss: float | None = None
    general_loss: float | None = None
    best_general_loss: float | None = None
    seconds: float = 0.0
    finished: str | None = None

    @property
    def forgetting(self) -> float | None:
        """By how much the loss on the general text rose, in nats per token; None when nobody measures it."""
        if self.general_loss is None or self.first_general_loss is None:
            return None
        return self.general_loss - self.first_general_loss

    def layout(self, base: Layout) -> Layout:
        """Return `base` with the present sizes."""
        return dataclasses.replace(base, micro_batch_size=self.micro_batch_size, row_tokens=self.row_tokens)

    def evaluation_layout(self, base: Layout) -> Layout:
        """Return `base` with evaluation's present sizes."""
        size, row_tokens = self.evaluation_micro_batch_size, self.evaluation_row_tokens
        return dataclasses.replace(base, micro_batch_size=size, row_tokens=row_tokens)


def capture(
    run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, state) of everything that the next step depends on."""
    tensors = {_TRAINABLE + name: parameter.detach() for name, parameter in run.trainable()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{index}/{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    for method, companion in run.companions.items():
        tensors |= {f"{_COMPANION}{method}/{key}": value for key, value in companion.state().items()}
    tensors |= random_states(run.device)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {
        "progress": dataclasses.asdict(progress),
        "optimizer": {"numbers": numbers, "groups": groups},
        "scaler": scaler.state_dict(),
    }
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}, state


def restore(
    run: Run,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
) -> Progress:
    """Put a captured state back and return its progress.

    Raises:
        CheckpointError: the state belongs to other parameters.
    """
    restore_trainable(run, tensors)
    entries: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            index, key = name.removeprefix(_OPTIMIZER).split("/", 1)
            entries.setdefault(int(index), {})[key] = tensor
    for index, numbers in state["optimizer"]["numbers"].items():
        entries.setdefault(int(index), {}).update(numbers)
    present = optimizer.state_dict()
    groups = [
        {**group, **saved} for group, saved in zip(present["param_groups"], state["optimizer"]["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
    scaler.load_state_dict(state["scaler"])
    restore_random_states(run.device, tensors)
    return Progress(**state["progress"])


def restore_trainable(run: Run, tensors: dict[str, Tensor]) -> None:
    """Put the captured values of the trainable parameters back, and what methods keep beside them.

    Raises:
        CheckpointError: names or shapes differ.
    """
    present, saved = dict(run.trainable()), trainable_of(tensors)
    if present.keys() != saved.keys():
        differing = sorted(present.keys() ^ saved.keys())
        raise CheckpointError(f"The checkpoint holds other parameters than the recipe trains, e.g. {differing[0]}.")
    with torch.no_grad():
        for name, parameter in present.items():
            if parameter.shape != saved[name].shape:
                raise CheckpointError(
                    f"The checkpoint's '{name}' has shape {tuple(saved[name].shape)}, "
                    f"the model's {tuple(parameter.shape)}."
                )
            parameter.copy_(saved[name])
    for method, companion in run.companions.items():
        prefix = f"{_COMPANION}{method}/"
        companion.restore({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})


def trainable_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the trainable parameters' values in a captured state, by name."""
    return {name.removeprefix(_TRAINABLE): value for name, value in tensors.items() if name.startswith(_TRAINABLE)}


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators, of the CPU and of `device`."""
    states = {_RANDOM + "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[_RANDOM + "cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(device: torch.device, tensors: dict[str, Tensor]) -> None:
    """Put back what `random_states` returned."""
    torch.set_rng_state(tensors[_RANDOM + "cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors[_RANDOM + "cuda"], device)
