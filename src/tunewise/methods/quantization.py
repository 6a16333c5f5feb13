"""Quantization: store the frozen weights of linear layers in 4 or 8 bits (with LoRA on top: QLoRA).

Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314): NF4 in blocks of 64 with double quantization, 4.127 bits a
weight.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import nn

from tunewise.errors import Conflict
from tunewise.layers import fp8
from tunewise.layers.fp8_linear import Fp8ProductLinear
from tunewise.layers.group_quantized import GROUP_KINDS, GroupKind, GroupQuantizedLinear
from tunewise.layers.int8_linear import Int8ProductLinear
from tunewise.layers.linear import (
    is_tied,
    linear_layers,
    linear_shape,
    output_head,
    stacked_experts,
    weight_of,
)
from tunewise.layers.quantized import QuantizedLinear, QuantKind, quantize_linear
from tunewise.methods.low_rank import LowRank
from tunewise.methods.method import Run
from tunewise.methods.naming import select
from tunewise.methods.precision import Precision
from tunewise.recipe import Fidelity, Method, Recipe, Slot
from tunewise.units import format_bytes

Compute = Literal["dequantize", "int8", "fp8"]

HEAD = "lm_head"
"""Names the output head in `skip_modules`, whatever the model itself calls it."""


class Quantize(Method):
    """Pack the linear layers' weights; they are unpacked for every use and never trained.

    Formula: W ~ level[code] x scale of its block; nf4's levels are the quantiles of N(0, 1), int8 and fp8 have a
    scale a row, int4 to int2 a scale and an offset a group.

    Source: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), sections 2 and 3; Xu et al. 2023, "QA-LoRA"
    (2309.14717) for the groups. When to use: frozen weights fill the memory and an adapter is trained beside them.
    When not: weights fit in 16 bits: every use unpacks them, so a step takes longer; or they are trained (refused).

    Attributes:
        kind: "nf4" or "fp4" (bitsandbytes), "int8" or "fp8" (E4M3; one scale a row; need no library), or "int4",
            "int3", "int2" (a scale and an offset for each group of inputs; needs no library; with 'qalora' the merged
            model keeps these bits).
        double_quant: whether the scales of 4-bit blocks are stored in 8 bits; None means yes. For nf4 and fp4.
        block_size: weights that share a scale; None means 64, and 32 for int4, int3 and int2. Not for int8
            and fp8.
        compute: "dequantize" multiplies with the unpacked weight; "int8" (with kind int8, on a CPU) multiplies in 8
            bits: the rows of the inputs are rounded as well, forward and for the inputs' gradients (W8A8, as
            SwitchBack), up to twice as fast as bf16 where the processor has AVX-512 VNNI and 'fused' compiles its
            kernels; "fp8" (with kind fp8) does the same in E4M3, for the tensor cores of Ada, Hopper and later cards,
            with precision bf16; a CPU computes it no faster than fp32. What an adapter computes itself keeps its
            precision, and so does an output head (a packed one is unpacked), see `head_compute`.
        head_compute: "dense" computes the loss with the output head as it is; "int8" (with compute int8) makes its
            logits and the gradient of the hidden states in 8 bits as well, with a copy of the head's weight for it
            ('fused' keeps two, one for each direction).
            Probabilities, most of which are smaller than half a step of their row, are rounded up or down at random,
            right on average. What is only measured (a validation loss) is measured with the head itself.
        skip_modules: name endings of layers that keep their precision; "lm_head" means the output head.
    """

    name: ClassVar[str] = "quantize"
    slot: ClassVar[Slot] = Slot.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    kind: QuantKind | GroupKind = "nf4"
    double_quant: bool | None = None
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] | None = None
    compute: Compute = "dequantize"
    head_compute: Literal["dense", "int8"] = "dense"
    skip_modules: tuple[str, ...] = (HEAD,)

    @model_validator(mode="after")
    def _options_of_the_kind(self) -> Self:
        if self.kind in ("int8", "fp8") and (self.double_quant is not None or self.block_size is not None):
            raise ValueError(f"'double_quant' and 'block_size' belong to nf4 and fp4; {self.kind} has one scale a row")
        if self.compute != "dequantize" and self.kind != self.compute:
            raise ValueError(
                f"compute: {self.compute} multiplies weights that are stored so, and {self.kind} has other ones; use "
                f"kind: {self.compute}"
            )
        if self.head_compute == "int8" and self.compute != "int8":
            raise ValueError("head_compute: int8 goes with compute: int8")
        if self.head_compute == "int8" and HEAD not in self.skip_modules:
            raise ValueError(f"head_compute: int8 multiplies a copy of the head; leave '{HEAD}' in skip_modules")
        if self.kind in GROUP_KINDS and self.double_quant is not None:
            raise ValueError(f"'double_quant' belongs to nf4 and fp4; {self.kind} keeps its scales as they are")
        return self

    def conflict(self, recipe: Recipe) -> str | None:
        """A packed weight cannot be trained, so something else must be."""
        if not recipe.in_slot(Slot.ADAPTER):
            return "quantize packs the weights, so full fine-tuning cannot train them; add 'lora' to the recipe"
        others = [method.name for method in recipe.in_slot(Slot.LOSS) if method.name != "supervised_loss"]
        if self.head_compute == "int8" and others:
            return f"quantize.head_compute: int8 is for supervised_loss, and this recipe has {others[0]}; leave it out"
        return None

    def apply(self, run: Run) -> None:
        """Replace the linear layers by packed ones.

        Raises:
            InputError: `skip_modules` names something that the model does not have.
            Conflict: the output head should be packed but shares its tensor with the token embedding; or the device
                does not multiply what `compute` names.
            MissingBackend: nf4 or fp4 without bitsandbytes.
        """
        layers, head = self._targets(run.model), output_head(run.model)
        if self.compute == "int8" and run.device.type != "cpu":
            raise Conflict("quantize: compute int8 is for CPUs. Leave it out, or train with device: cpu.")
        if self.compute == "fp8" and run.device.type == "cuda":
            _check_fp8(run, {name: layer for name, layer in layers.items() if layer is not head})
        low_rank = run.recipe.get(LowRank)
        is_needed = low_rank is not None and low_rank.needs_original_weights
        before = after = 0
        for name, layer in layers.items():
            packed = self._pack(layer, layer is head)
            packed.train(layer.training)
            weight = weight_of(layer)
            if is_needed:
                run.original_weights[name] = weight.detach()
            before += weight.numel() * weight.element_size()
            after += packed.stored_bytes
            run.model.set_submodule(name, packed)
            if run.streamer is not None:
                run.streamer.park_inside(name, packed)
        if run.device.type == "cpu" and run.streamer is None:
            _leave_the_file(run.model)
        multiplied = {"int8": ", multiplied in 8 bits", "fp8": ", multiplied in FP8"}.get(self.compute, "")
        sizes = f"{format_bytes(before)} -> {format_bytes(after)}"
        run.say(f"{self.kind} weights in {len(layers)} linear layers{multiplied}: {sizes}")
        stacked = stacked_experts(run.model)
        if stacked:
            size = sum(parameter.numel() * parameter.element_size() for parameter in stacked.values())
            run.say(
                f"experts in stacked tensors such as {next(iter(stacked))} are no linear layers and keep "
                f"their precision: {format_bytes(size)}"
            )

    def _pack(self, layer: nn.Module, is_head: bool) -> QuantizedLinear:
        if self.kind == "int4" or self.kind == "int3" or self.kind == "int2":
            return GroupQuantizedLinear(layer, self.kind, self.block_size or 32)
        if self.compute == "int8" and not is_head:
            return Int8ProductLinear(layer)
        if self.compute == "fp8" and not is_head:
            return Fp8ProductLinear(layer)
        return quantize_linear(layer, self.kind, self.block_size or 64, self.double_quant is not False)

    def _targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers to pack, in the model's order."""
        head = output_head(model)
        layers = linear_layers(model)
        if head is not None and HEAD not in self.skip_modules:
            if is_tied(model):
                raise Conflict(
                    "quantize: the output head shares its tensor with the token embedding, so packing a copy "
                    f"of it would only cost memory. Put '{HEAD}' into quantize.skip_modules."
                )
            layers |= {name: module for name, module in model.named_modules() if module is head}
        words = tuple(word for word in self.skip_modules if word != HEAD)
        skipped = set(select([name for name, _ in model.named_modules()], words, "quantize.skip_modules"))
        return {
            name: layer
            for name, layer in layers.items()
            if not any(name == skip or name.startswith(skip + ".") for skip in skipped)
        }


@torch.no_grad()
def _leave_the_file(model: nn.Module) -> None:
    """Give what was not packed memory of its own.

    Weights are read as parts of a file that is mapped as a whole: one of them keeps all pages that were read in the
    process, those of the packed weights too.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _check_fp8(run: Run, layers: dict[str, nn.Module]) -> None:
    """See whether a CUDA device can multiply these layers in FP8.

    Raises:
        Conflict: it is older than Ada, the run does not compute in bf16, or a layer's sizes do not suit.
    """
    if not run.is_dry and torch.cuda.get_device_capability(run.device) < (8, 9):
        raise Conflict("quantize: compute fp8 needs a card of the Ada or Hopper generation or later. Leave it out.")
    precision = run.recipe.get(Precision)  # which acts on the run after weights and adapters
    if precision is None or precision.compute != "bf16":
        raise Conflict("quantize: compute fp8 makes bf16 of its products on CUDA. Use precision: {compute: bf16}.")
    for name, layer in layers.items():
        inputs, outputs = linear_shape(layer)
        if inputs % fp8.MULTIPLE or outputs % fp8.MULTIPLE:
            raise Conflict(
                f"quantize: compute fp8 needs sizes that are multiples of {fp8.MULTIPLE} on CUDA, and '{name}' maps "
                f"{inputs} to {outputs}. Put it into quantize.skip_modules."
            )
