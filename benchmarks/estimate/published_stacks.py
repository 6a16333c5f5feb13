"""What other training stacks do where their published tables are silent, read in their code.

Settings, not numbers; where a stack computes something that no method of ours does, it is written down as a method, so
that the dry run can watch it (`published_litgpt`, `published_peft`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from published_litgpt import LossOfChunks

from tunewise.methods import WholeLoss
from tunewise.recipe import Method


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
        is_litgpt: see `published_litgpt`. What early 4-bit layers keep lives until the graph dies, so with the logits
            in the loop's variable the previous micro-batch's inputs are still there, too.
        lora_dropout: what its LoRA configurations say; where that is not known, what most examples have.
        autocasts: whether fp32 adapters beside a 16-bit base are trained in an autocast region.
        peak_is: what its code measures where its tables say "peak" and no more; "": not known.
        empties_cache: whether its script gives unused memory back, so that what is reserved follows what is needed.
    """

    is_tied: bool | None = None
    adapter: Literal["fp32", "same"] = "fp32"
    loss: type[Method] = WholeLoss
    quantizes_head: bool = False
    double_quant: bool = True
    max_grad_norm: float | None = 1.0
    has_fused_gelu: bool = False
    is_litgpt: bool = False
    lora_dropout: float = 0.05
    autocasts: bool = True
    peak_is: Literal["", "allocated", "active"] = ""
    empties_cache: bool = False


STACKS: dict[str, Stack] = {
    # litgpt/model.py makes a head of its own; finetune/lora.py casts all to bf16 ("bf16-true") and makes the logits in
    # chunks of 128, which Fabric's `convert_output` turns into fp32 and the loop's variable keeps until the next ones;
    # BitsandbytesPrecision packs every Linear, "nf4" without double quantization; the attention expands its heads.
    "litgpt": Stack(
        is_tied=False,
        adapter="same",
        loss=LossOfChunks,
        quantizes_head=True,
        double_quant=False,
        max_grad_norm=None,
        has_fused_gelu=True,
        is_litgpt=True,
    ),
    # training/memory.py reports the peak of active bytes.
    "torchtune": Stack(adapter="same", max_grad_norm=None, lora_dropout=0.0, peak_is="active"),
    # benchmarks/quantized_training/pretrain_llama2.py logs max_memory_allocated.
    "ao": Stack(adapter="same", max_grad_norm=None, peak_is="allocated"),
    # method_comparison/MetaMathQA: run.py calls empty_cache() every ten steps; "use_amp" is false, "lora_dropout" 0.
    "peft": Stack(lora_dropout=0.0, autocasts=False, empties_cache=True),
}
"""By the repository's name without its owner, which has changed before."""

DEFAULT_STACK = Stack()
"""transformers with PEFT under its Trainer: adapters in fp32 under autocast, the loss over fp32 logits."""


def stack_of(repository: str) -> Stack:
    """Return what is known of a repository's code."""
    return STACKS.get(repository.split("/")[-1].lower(), DEFAULT_STACK)
