"""Gradient checkpointing: keep a block's input instead of its activations, and compute them again in
backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from tunewise.errors import Conflict
from tunewise.layers.head import base_model_of
from tunewise.layers.lora import lora_layers
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, PositiveInt, Slot

_MATMULS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
    if hasattr(torch.ops.aten, name)
)
_ATTENTIONS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 3,
    torch.ops.aten._scaled_dot_product_flash_attention: 3,
    torch.ops.aten._scaled_dot_product_efficient_attention: 5,
    torch.ops.aten._scaled_dot_product_cudnn_attention: 5,
}
"""Fused attentions and which of their arguments is the probability of dropout."""


class Checkpointing(Method):
    """Recompute the activations of transformer blocks in backward (Chen et al. 2016, arXiv 1604.06174).

    Formula: kept: a block's input; everything inside is computed a second time in backward (`selective`: all but
    products).

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174), section 3;
    Korthikanti et al. 2022 (2205.05198) for selective. When to use: activations fill the memory: long rows, many
    blocks. When not: memory suffices: it costs about a forward pass, a third of a step.

    Attributes:
        every: checkpoint every n-th block; 1 checkpoints all of them, 2 half of them.
        policy: "full" keeps nothing of a block but its input; "selective" keeps the outputs of matrix
            products and of attention, which are what is slow to compute, and recomputes the rest.
    """

    name: ClassVar[str] = "checkpointing"
    slot: ClassVar[Slot] = Slot.ACTIVATIONS
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    every: PositiveInt = 1
    policy: Literal["full", "selective"] = "full"

    def apply(self, run: Run) -> None:
        """Switch checkpointing on in the model's blocks, without torch's reentrant variant.

        The non-reentrant one needs no input that requires a gradient, so it works around frozen embeddings,
        and it restores the random state, so dropout repeats itself.

        Raises:
            Conflict: the architecture has no blocks that can be checkpointed.
        """
        model = base_model_of(run.model)
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise Conflict(
                f"checkpointing: {type(model).__name__} has no blocks that transformers can checkpoint. "
                "Leave checkpointing out."
            )
        chosen = blocks[:: self.every]
        function = self._function()
        if self.policy == "selective":  # what is kept of a product must not be written over
            for layer in lora_layers(run.model).values():
                layer.in_place = False
        for block in chosen:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = function
        run.say(f"checkpointing: {self.policy}, {len(chosen)} of {len(blocks)} blocks")

    def _function(self) -> Callable[..., Any]:
        if self.policy == "full":
            return partial(checkpoint, use_reentrant=False)
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is slow to compute; attention with dropout draws random numbers, which recomputing must draw
    again."""
    del context
    packet = operator.overloadpacket if isinstance(operator, torch._ops.OpOverload) else operator
    # A product that is written into memory of its caller's (`out=`) is not there any more in backward.
    keep = packet in _MATMULS and getattr(operator, "_overloadname", "") != "out"
    if packet in _ATTENTIONS:
        place = _ATTENTIONS[packet]
        dropout = args[place] if len(args) > place else kwargs.get("dropout_p", 0.0)
        keep = dropout == 0.0
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
