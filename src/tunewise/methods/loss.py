"""Over which logits the loss is computed: all of them, or in chunks those of supervised tokens only."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from tunewise.errors import Conflict
from tunewise.layers.head import CausalHead
from tunewise.layers.loss import supervised_loss, whole_loss
from tunewise.layers.narrow_head import NarrowHead
from tunewise.layers.native import SUFFIXES
from tunewise.methods.method import Loss, Run
from tunewise.methods.quantization import Quantize
from tunewise.recipe import Fidelity, Method, PositiveInt, Recipe, Slot
from tunewise.units import format_bytes
from tunewise.workload.batches import MicroBatch


class WholeLoss(Method):
    """Cross entropy over the logits of every position; works with every model.

    Formula: CE = logsumexp(W_head h) - (W_head h)[label], the logits of all positions at once.

    Source: the definition; transformers' own loss. When to use: a model whose head `supervised_loss` cannot take
    apart, or to compare with it. When not: anywhere else: logits of prompts are computed for nothing, and a large
    vocabulary's fill the memory.
    """

    name: ClassVar[str] = "whole_loss"
    slot: ClassVar[Slot] = Slot.LOSS
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def apply(self, run: Run) -> None:
        """Set the loss."""
        run.loss = _whole


class SupervisedLoss(Method):
    """Cross entropy over supervised positions only, with never more than `chunk_tokens` rows of logits in
    memory.

    The same sum as the whole loss; its gradient is computed chunk by chunk in the forward pass.

    Formula: CE as in `whole_loss`; its gradient (softmax - onehot) W_head is made chunk by chunk.

    Source: Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), section 3.2, and Wijmans et al. 2024, "Cut Your
    Losses" (2411.09009), have the idea. When to use: always, where the model allows it (it is the default): large
    vocabularies and long prompts most of all. When not: logits are changed after the head by something that the
    model does elsewhere (refused).
    """

    name: ClassVar[str] = "supervised_loss"
    slot: ClassVar[Slot] = Slot.LOSS
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    chunk_tokens: PositiveInt = 1024

    def conflict(self, recipe: Recipe) -> str | None:
        """Virtual tokens are put in front by peft's own forward pass, which this loss goes around."""
        peft = next((method for method in recipe.methods or () if method.name == "peft"), None)
        if getattr(peft, "is_prompt_learning", False):
            return "supervised_loss goes around the virtual tokens of this peft method; use whole_loss"
        return None

    def apply(self, run: Run) -> None:
        """Set the loss.

        Raises:
            Conflict: the model's head computes something that we do not know, or should be multiplied in 8 bits and
                cannot.
        """
        head = verified_head(run)
        quantize = run.recipe.get(Quantize)
        narrow = _narrow(run, head) if quantize is not None and quantize.head_compute == "int8" else None
        run.loss = loss_of_supervised(head, self.chunk_tokens, narrow)


def verified_head(run: Run) -> CausalHead:
    """Return the model's head, proved to be what we take it for.

    Raises:
        Conflict: the model's head computes something that we do not know.
    """
    head = CausalHead.of(run.model)
    if not run.is_dry:
        with torch.autocast(run.device.type, run.autocast_dtype, enabled=run.autocast_dtype is not None):
            head.verify(run.model)
    return head


def _narrow(run: Run, head: CausalHead) -> NarrowHead:
    """Return a copy of the head in 8 bits.

    Raises:
        Conflict: the head is trained, caps its logits, or is no plain linear layer.
    """
    output = head.output
    if type(output) is not nn.Linear or head.softcap is not None:
        raise Conflict(
            "quantize.head_compute: int8 needs an output head that is a plain linear layer, with logits that nothing "
            "caps. Leave it out."
        )
    if any(parameter.requires_grad for parameter in output.parameters()):
        raise Conflict("quantize.head_compute: int8 needs an output head that is not trained. Leave it out.")
    fused = next((method for method in run.recipe.methods or () if method.name == "fused"), None)
    has_kernel = bool(getattr(fused, "loss", False)) and run.device.type == "cpu"
    narrow = NarrowHead.of(output, has_kernel and (run.autocast_dtype or output.weight.dtype) in SUFFIXES)
    run.say(f"output head multiplied in 8 bits, with a copy of it: {format_bytes(narrow.stored_bytes)}")
    return narrow


def loss_of_supervised(head: CausalHead, chunk_tokens: int, narrow: NarrowHead | None = None) -> Loss:
    """Return the loss over supervised positions only."""

    def supervised(run: Run, batch: MicroBatch) -> Tensor:
        mask_R1LL = run.documents.mask(batch.input_ids_RL)
        hidden_RLD = head.hidden(run.model, batch.input_ids_RL, batch.position_ids_RL, mask_R1LL)
        return supervised_loss(
            hidden_RLD, batch.labels_RL, head, batch.num_supervised, chunk_tokens, run.uses_loss_kernel, narrow
        )

    return supervised


def _whole(run: Run, batch: MicroBatch) -> Tensor:
    peft_config = getattr(run.model, "active_peft_config", None)
    has_virtual_tokens = bool(getattr(peft_config, "is_prompt_learning", False))
    # peft counts its virtual tokens' positions itself and ignores (with a warning) any that it is given.
    positions = {} if has_virtual_tokens else {"position_ids": batch.position_ids_RL}
    mask_R1LL = run.documents.mask(batch.input_ids_RL)
    output = run.model(input_ids=batch.input_ids_RL, attention_mask=mask_R1LL, use_cache=False, **positions)
    logits_RLV: Tensor = output.logits
    return whole_loss(logits_RLV[:, -batch.input_ids_RL.shape[1] :], batch.labels_RL)
