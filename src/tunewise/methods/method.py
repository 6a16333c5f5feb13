"""What a method may change: the `Run`, the only mutable thing, on its way from a recipe to a step.

`engine.build` makes a Run from a recipe, a workload and a device, and lets the recipe's methods change it slot by slot;
`engine.step` computes with it. A run is built the same way on fake tensors (a dry run) and on real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunewise.layers.attention import DocumentLayout
from tunewise.layers.streaming import Streamer
from tunewise.recipe import Recipe
from tunewise.workload.batches import Layout, MicroBatch

ParameterGroup = dict[str, Any]
"""A torch optimizer's parameter group: "params" (a list of parameters), "names", "lr", "weight_decay", ..."""


class Loss(Protocol):
    """Sum of the cross entropies of a micro-batch's supervised tokens, in nats, as a differentiable fp32 scalar."""

    def __call__(self, run: Run, batch: MicroBatch) -> Tensor:
        """Return the sum over `batch`."""


class Companion(Protocol):
    """What a method changes from step to step (a drawn rank, a budget of ranks), and what of it a checkpoint keeps."""

    def begin_step(self, step: int, num_steps: int | None) -> None:
        """Prepare step number `step`, counted from 0, of `num_steps`; None: nobody knows (a measurement, a dry run).

        May be called again for the same step: after running out of memory, or after a resumption.
        """

    def after_update(self) -> None:
        """Look at the step's gradients once the optimizer has used them."""

    def state(self) -> dict[str, Tensor]:
        """Return what the next step depends on; empty where everything follows from the step's number."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` returned."""


@dataclass
class Run:
    """Model, layout, loss, optimizer: everything that one global step needs.

    Attributes:
        recipe: the complete recipe.
        device: where the step runs.
        model: a transformers causal language model (or a peft model around one).
        layout: how the documents of a step lie in rows and micro-batches.
        documents: where the documents of the present micro-batch lie; attention functions read it.
        loss: the loss function; validation takes it.
        objective: what a step minimises where that is more than the loss (`kl_to_base`), else None.
        make_optimizer: from parameter groups to an optimizer.
        learning_rate_factors: factors on the learning rate for single parameters, by name.
        storage_dtype: how frozen weights are stored.
        autocast_dtype: the dtype of an autocast region around forward, or None for none.
        use_grad_scaler: whether fp16's dynamic loss scaling is needed.
        saved_tensors: makes the context of a forward pass, in which what autograd saves can be put elsewhere.
        streamer: keeps the blocks' frozen weights elsewhere until they are needed, or None.
        undo_padding: gives a padded vocabulary its own size again, before the model is saved; None: nothing is padded.
        update_in_backward: whether the optimizer updates each parameter as soon as its gradient is there.
        original_weights: weights before quantization, (out, in), by layer, where a method starts from what quantization
            has lost; it takes them out.
        companions: what changes from step to step, by the name of the method that changes it.
        penalties: terms that are added to the loss of a step, once a step, and not reported as its loss.
        uses_loss_kernel: whether the loss may use the compiled kernel for cross entropy.
        is_dry: True when the tensors are fake: methods must not read values.
        notes: what methods have to say to the user ("LoRA on 28 linear layers").
    """

    recipe: Recipe
    device: torch.device
    model: nn.Module
    layout: Layout
    loss: Loss
    make_optimizer: Callable[[list[ParameterGroup]], torch.optim.Optimizer]
    objective: Loss | None = None
    documents: DocumentLayout = field(default_factory=DocumentLayout)
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    storage_dtype: torch.dtype = torch.float32
    autocast_dtype: torch.dtype | None = None
    use_grad_scaler: bool = False
    saved_tensors: Callable[[], AbstractContextManager[object]] = nullcontext
    streamer: Streamer | None = None
    undo_padding: Callable[[], None] | None = None
    update_in_backward: bool = False
    original_weights: dict[str, Tensor] = field(default_factory=dict)
    companions: dict[str, Companion] = field(default_factory=dict)
    penalties: list[Callable[[], Tensor]] = field(default_factory=list)
    uses_loss_kernel: bool = False
    is_dry: bool = False
    notes: list[str] = field(default_factory=list)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of what is learnt, each tensor once however often it is tied."""
        seen: set[int] = set()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def say(self, note: str) -> None:
        """Keep a sentence for the user."""
        self.notes.append(note)
