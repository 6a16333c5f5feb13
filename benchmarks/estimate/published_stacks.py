"""What other training stacks do where their published tables are silent, read in their code.

Settings, not numbers; where a stack computes something that no method of ours does, it is written down here as a
method, so that the dry run can watch it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.layers.head import CausalHead
from tunewise.layers.quantized import FourBitLinear
from tunewise.methods import WholeLoss
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, Slot
from tunewise.workload.batches import IGNORED, MicroBatch


class LossOfChunks(Method):
    """Logits made in chunks, all of them then converted to fp32 and kept until the next ones are there (litgpt)."""

    name: ClassVar[str] = "loss_of_chunks"
    slot: ClassVar[Slot] = Slot.LOSS
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    chunk_tokens: int = 128

    def apply(self, run: Run) -> None:
        """Set the loss."""
        head, kept = CausalHead.of(run.model), dict[str, list[Tensor]]()

        def loss(run: Run, batch: MicroBatch) -> Tensor:
            hidden_RLD = head.hidden(run.model, batch.input_ids_RL, batch.position_ids_RL)
            made = [head.logits(part) for part in hidden_RLD.split(self.chunk_tokens, dim=1)]
            kept["logits"] = [logits.float() for logits in made]
            del made
            labels = batch.labels_RL.split(self.chunk_tokens, dim=1)
            parts = [
                F.cross_entropy(logits.flatten(0, 1), part.flatten(), ignore_index=IGNORED, reduction="sum")
                for logits, part in zip(kept["logits"], labels, strict=True)
            ]
            return torch.stack(parts).sum().float()

        run.loss = loss


class _KeptInput(torch.autograd.Function):
    """The identity, which holds its argument as long as the graph lives, not only until backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.kept = input
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class EarlyBitsandbytes(Method):
    """4-bit layers as bitsandbytes had them in 2024 (MatMul4Bit), with weights quantized from fp16 (Fabric's plugin).

    Each keeps its input (`ctx.tensors = (A, B)`) and unpacks its weight into fp16, then copies it into the compute
    dtype (`dequantize_4bit(B, quant_state).to(A.dtype)`).
    """

    name: ClassVar[str] = "early_bitsandbytes"
    slot: ClassVar[Slot] = Slot.KERNELS
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def apply(self, run: Run) -> None:
        """Hook the layers."""
        for module in run.model.modules():
            if isinstance(module, FourBitLinear):
                module.register_forward_pre_hook(lambda _, arguments: (_KeptInput.apply(arguments[0]),))
                module.dense_weight = partial(_unpacked_twice, module.dense_weight)  # type: ignore[method-assign]


def _unpacked_twice(dense_weight: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
    return dense_weight(torch.float16).to(dtype)


@dataclass(frozen=True)
class Stack:
    """What a repository's code does where its table is silent.

    Attributes:
        is_tied: whether a head that the checkpoint ties to the embedding stays tied; None: as the configuration says.
        adapter: the dtype of adapters beside a 16-bit base.
        loss: over all logits at once (transformers), or over chunks.
        quantizes_head: whether 4-bit quantization packs the output head too.
        double_quant: whether scales are quantized again where the row does not say so.
        max_grad_norm: None where gradients are not clipped.
        has_fused_gelu: whether the approximated GELU is one operator, where transformers' "gelu_new" is seven.
        has_early_bitsandbytes: see `EarlyBitsandbytes`. What its layers keep lives until the graph dies, so with the
            logits in the loop's variable the previous micro-batch's inputs are still there, too.
    """

    is_tied: bool | None = None
    adapter: Literal["fp32", "same"] = "fp32"
    loss: type[Method] = WholeLoss
    quantizes_head: bool = False
    double_quant: bool = True
    max_grad_norm: float | None = 1.0
    has_fused_gelu: bool = False
    has_early_bitsandbytes: bool = False


STACKS: dict[str, Stack] = {
    # litgpt/model.py makes a head of its own; finetune/lora.py casts all to bf16 ("bf16-true") and makes the logits in
    # chunks of 128, which Fabric's `convert_output` turns into fp32 and the loop's variable keeps until the next ones;
    # BitsandbytesPrecision packs every Linear, "nf4" without double quantization.
    "Lightning-AI/litgpt": Stack(False, "same", LossOfChunks, True, False, None, True, True),
    "pytorch/torchtune": Stack(adapter="same", max_grad_norm=None),
}
DEFAULT_STACK = Stack()
"""transformers with PEFT: adapters in fp32, the loss over fp32 logits."""
