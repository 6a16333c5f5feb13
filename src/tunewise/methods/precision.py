"""In which dtype weights are stored, in which one is computed, and a table that proves it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from tunewise.errors import Conflict
from tunewise.layers.lora import LoRALinear
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, Recipe, Slot
from tunewise.units import format_count

Compute = Literal["fp32", "tf32", "bf16", "fp16"]
DtypeTable = dict[str, dict[torch.dtype, int]]

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_compute(device: torch.device) -> Literal["fp32", "bf16"]:
    """Return bf16 where the device multiplies matrices in it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu" and {"avx512_bf16", "amx_bf16"} & _cpu_flags():
        return "bf16"
    return "fp32"


def _cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return set()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


class Precision(Method):
    """The dtypes of computation and of the trainable weights; frozen weights are stored in the compute dtype.

    Formula: products in `compute`, sums and the loss in fp32; fp16 gradients are scaled by a power of two, which
    the update takes out.

    Source: Micikevicius et al. 2017, "Mixed Precision Training" (arXiv 1710.03740); Kalamkar et al. 2019, "A Study
    of BFLOAT16" (1905.12322). When to use: bf16 wherever the machine multiplies it faster than fp32; `trainable:
    same` where 16-bit weights alone fit. When not: fp16 on hardware that has bf16; 16-bit trained weights at small
    learning rates, whose updates round away.

    Attributes:
        compute: dtype of matrix products. tf32 stores fp32 and lets a CUDA device round the factors of a
            product to 10 bits of mantissa; it sets torch's global switch, which stays set for the life of the
            process. bf16 on a CPU without hardware for it is allowed, and slow.
        trainable: "fp32" keeps fp32 masters of what is trained (mixed precision, Micikevicius et al. 2017,
            arXiv 1710.03740); "same" trains in the compute dtype itself (pure).
    """

    name: ClassVar[str] = "precision"
    slot: ClassVar[Slot] = Slot.PRECISION
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    compute: Compute = "fp32"
    trainable: Literal["fp32", "same"] = "fp32"

    @property
    def storage_dtype(self) -> torch.dtype:
        """How frozen weights are stored, so that no fp32 copy of a frozen base is ever made."""
        return _DTYPES[self.compute]

    @property
    def trainable_dtype(self) -> torch.dtype:
        """How trained weights are stored."""
        return torch.float32 if self.trainable == "fp32" else self.storage_dtype

    def loading_dtype(self, recipe: Recipe) -> torch.dtype:
        """Return the dtype in which to load the base model.

        It is the storage dtype where adapters are trained; where weights of the base are, their masters must not
        be rounded first. Modules that an adapter saves in full start from rounded weights.
        """
        names = {method.name for method in recipe.in_slot(Slot.ADAPTER)}
        return self.trainable_dtype if not names or "freeze" in names else self.storage_dtype

    def conflict(self, recipe: Recipe) -> str | None:
        """Check what needs no device to be known."""
        if self.compute == "fp16" and self.trainable == "same":
            return "precision: fp16 gradients of fp16 weights cannot be unscaled; use trainable: fp32, or compute: bf16"
        if self.compute == "tf32" and recipe.device == "cpu":
            return "precision: tf32 exists on CUDA devices only; use compute: fp32 or bf16"
        return None

    def apply(self, run: Run) -> None:
        """Cast the weights and say how to compute.

        Raises:
            Conflict: tf32 without CUDA.
        """
        if self.compute == "tf32":
            if run.device.type != "cuda":
                raise Conflict("precision: tf32 exists on CUDA devices only. Use compute: fp32 or bf16.")
            if not run.is_dry:
                torch.set_float32_matmul_precision("high")
        if self.compute == "bf16" and run.device.type == "cpu" and default_compute(run.device) == "fp32":
            run.say(
                "precision: this processor has no products in bf16, so they take hundreds of times as long as fp32's"
            )
        beside = _frozen_beside_trained(run.model)
        for parameter in run.model.parameters():
            is_trained = parameter.requires_grad or id(parameter) in beside
            dtype = self.trainable_dtype if is_trained else self.storage_dtype
            if _is_plain_float(parameter) and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        run.storage_dtype = self.storage_dtype
        is_mixed = self.storage_dtype.itemsize == 2 and self.trainable == "fp32"
        # Our LoRA layer casts its inputs itself; any other layer with fp32 masters needs autocast to meet
        # 16-bit inputs.
        run.autocast_dtype = self.storage_dtype if is_mixed and _trains_outside_lora(run.model) else None
        run.use_grad_scaler = self.compute == "fp16"


def _frozen_beside_trained(model: nn.Module) -> set[int]:
    """Return the ids of frozen vectors in modules that train others: a norm takes weight and bias of one dtype only."""
    found: set[int] = set()
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 1]
        if any(parameter.requires_grad for parameter in own):
            found |= {id(parameter) for parameter in own if not parameter.requires_grad}
    return found


def dtype_table(model: nn.Module) -> DtypeTable:
    """Return how many numbers of each dtype are "trainable" and "frozen"; tied weights count once."""
    table: dict[str, Counter[torch.dtype]] = {"trainable": Counter(), "frozen": Counter()}
    for parameter in model.parameters():
        table["trainable" if parameter.requires_grad else "frozen"][parameter.dtype] += parameter.numel()
    return {kind: dict(counts) for kind, counts in table.items()}


def check_dtypes(run: Run) -> DtypeTable:
    """Return the table of dtypes, after making sure that what is trained has the dtype that the recipe asks
    for.

    Raises:
        Conflict: a trainable parameter has another dtype, or is quantized.
    """
    precision = run.recipe.get(Precision)
    if precision is None:
        raise ValueError("the recipe has no precision; pass it through tunewise.methods.complete first")
    for name, parameter in run.trainable():
        if parameter.dtype != precision.trainable_dtype:
            raise Conflict(
                f"precision: '{name}' is trained and should be {_short(precision.trainable_dtype)}, but is "
                f"{_short(parameter.dtype)}; a method after precision changed it."
            )
    table = dtype_table(run.model)
    shown = [
        f"{kind} {format_count(count)} in {_short(dtype)}"
        for kind, counts in table.items()
        for dtype, count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    autocast = f", autocast to {_short(run.autocast_dtype)}" if run.autocast_dtype is not None else ""
    run.say(f"precision: {', '.join(shown)}{autocast}{', loss scaling' if run.use_grad_scaler else ''}")
    return table


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_plain_float(parameter: nn.Parameter) -> bool:
    """Say whether this is an ordinary weight; quantized ones are integers, or floats of one byte."""
    return parameter.is_floating_point() and parameter.dtype.itemsize > 1


def _trains_outside_lora(model: nn.Module) -> bool:
    factors = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LoRALinear)
        for parameter in (module.lora_A.weight, module.lora_B.weight, *module.parameters(recurse=False))
    }
    return any(parameter.requires_grad and id(parameter) not in factors for parameter in model.parameters())
