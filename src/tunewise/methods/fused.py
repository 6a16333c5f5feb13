"""Fused kernels on the CPU: what torch does in many passes over memory, done in one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tunewise.errors import Conflict
from tunewise.layers.blocks import FusedAttention, fused_twin
from tunewise.layers.head import base_model_of
from tunewise.layers.int8_linear import Int8ProductLinear
from tunewise.layers.narrow_linear import unpacked_products
from tunewise.layers.native import library
from tunewise.layers.products import attend
from tunewise.methods.attention import Attention
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, Recipe, Slot

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest difference between a replacement and its original, relative to the original's largest number."""

_LENGTH = 12


class Fused(Method):
    """Compiled kernels on the CPU for norms, rotary positions, SwiGLU, attention per document and cross entropy.

    The kernels are C++ that the machine's compiler turns into a library on first use, in a few seconds. LoRA layers
    that share an input are computed as one function, so their factors meet it together; with AVX-512 BF16 by kernels
    that need no preparation for another number of tokens. Every replaced module is compared with the original when the
    run is built. Products of 'quantize' with compute int8 are made by kernels too.

    The default on a CPU with a compiler, for models of known families, unless a recipe says how attention is computed.
    Without a compiler the default is not taken and a note in `metrics.jsonl` says so; a recipe that names it needs one.

    Formula: norm, rotary, SwiGLU, attention and cross entropy as the model computes them, each in one pass over
    memory.

    Source: Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), and Han and Han 2023, Unsloth, do this on GPUs;
    these kernels are our own. When to use: a known family on a CPU with a compiler (the default there). When not:
    another machine trains on: bits differ between compilers, so a run does not resume bit for bit elsewhere.

    Attributes:
        norms: RMSNorm in one pass.
        mlp: gate, up, SwiGLU and down as one function.
        attention: attention per document: in bf16 and with AVX-512 BF16 in one kernel, else as batched products over
            documents of similar length.
        loss: cross entropy and its gradient in the logits' own memory.
    """

    name: ClassVar[str] = "fused"
    slot: ClassVar[Slot] = Slot.KERNELS
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    norms: bool = True
    mlp: bool = True
    attention: bool = True
    loss: bool = True

    def conflict(self, recipe: Recipe) -> str | None:
        """What is compared must have its weights; `stream` puts packed ones away before modules are replaced."""
        if {"stream", "quantize"} <= {method.name for method in recipe.methods or ()}:
            return (
                "fused compares modules as it replaces them, and 'stream' has put their quantized weights away; leave "
                "fused out"
            )
        return None

    def apply(self, run: Run) -> None:
        """Replace modules and choose kernels.

        Raises:
            Conflict: the device is no CPU, or there is no C++ compiler.
        """
        if run.device.type != "cpu":
            raise Conflict("fused: these kernels are for CPUs. Leave 'fused' out.")
        if not run.is_dry:
            library()
        attention = run.recipe.get(Attention)
        is_per_document = attention is not None and attention.kind == "per_document"
        if self.attention and is_per_document:
            run.documents.kernels = attend
        run.uses_loss_kernel = self.loss
        for layer in run.model.modules():
            if isinstance(layer, Int8ProductLinear):
                layer.uses_kernel = True
        counts: dict[str, int] = {}
        decoder = base_model_of(run.model)
        for name, module in list(decoder.named_modules()):
            twin = fused_twin(module, run.documents if self.attention and is_per_document else None)
            if twin is None or not self._wants(twin):
                continue
            if not run.is_dry:
                _verify(name, module, twin, run)
            twin.train(module.training)
            decoder.set_submodule(name, twin)
            counts[type(twin).__name__] = counts.get(type(twin).__name__, 0) + 1
        run.say("fused: " + (", ".join(f"{count} x {name}" for name, count in counts.items()) or "no module replaced"))

    def _wants(self, twin: nn.Module) -> bool:
        wanted = {"FusedRMSNorm": self.norms, "FusedMLP": self.mlp, "FusedAttention": self.attention}
        return wanted[type(twin).__name__]


@torch.no_grad()
def _verify(name: str, module: nn.Module, twin: Any, run: Run) -> None:
    """Compare a replacement with its original on random numbers, in the run's own precision.

    Raises:
        Conflict: they differ: this architecture computes something that we do not know.
    """
    dtype = run.storage_dtype
    autocast = torch.autocast(run.device.type, run.autocast_dtype, enabled=run.autocast_dtype is not None)
    size = _input_size(module)
    generator = torch.Generator().manual_seed(0)
    hidden_RLD = torch.randn(2, _LENGTH, size, generator=generator).to(dtype)
    arguments: tuple[object, ...] = ()
    was_training, lengths = module.training, run.documents.lengths
    run.documents.lengths = None
    if isinstance(twin, FusedAttention):
        angles = torch.arange(_LENGTH)[:, None] * torch.rand(twin.head_dim // 2, generator=generator)
        angle_1LD = torch.cat([angles, angles], dim=-1)[None]
        arguments = ((angle_1LD.cos().to(dtype), angle_1LD.sin().to(dtype)), None)
    try:
        with autocast, unpacked_products(module):
            ours, theirs = (each.eval()(hidden_RLD, *arguments) for each in (twin, module))
    finally:
        module.train(was_training)
        twin.train(was_training)
        run.documents.lengths = lengths
    ours, theirs = (part[0] if isinstance(part, tuple) else part for part in (ours, theirs))
    if (ours - theirs).abs().max() > _TOLERANCE[dtype] * theirs.abs().max():
        raise Conflict(
            f"fused: {type(module).__name__} ('{name}') computes something else than its kernel. Leave 'fused' out."
        )


def _input_size(module: Any) -> int:
    for name in ("q_proj", "gate_proj"):
        layer = getattr(module, name, None)
        if layer is not None:
            return int(layer.in_features)
    return int(module.weight.shape[0])
