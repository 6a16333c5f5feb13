"""LoRA: train a low-rank update beside frozen linear layers instead of the layers themselves.

Papers: LoRA, Hu et al. 2021 (arXiv 2106.09685); rsLoRA, Kalajdzievski 2023 (2312.03732); LoRA+, Hayou et al.
2024 (2402.12354); PiSSA, Meng et al. 2024 (2404.02948); LoftQ, Li et al. 2023 (2310.08659). Defaults (all linear
layers, alpha = 2 rank): Biderman et al. 2024, "LoRA learns less and forgets less" (2405.09673), section 5.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tunewise.layers.loftq import start_from_quantization_error
from tunewise.layers.lora import LoraInit, LoRALinear, lora_layers
from tunewise.methods.low_rank import LowRank
from tunewise.methods.method import Run
from tunewise.methods.quantization import Quantize
from tunewise.recipe import Recipe


class LoRA(LowRank):
    """Low-rank adaptation with our own fast layer; written and read in PEFT's file format.

    Formula: y = W x + s B A x, s = alpha / rank (`use_rslora`: alpha / sqrt(rank)); B starts at zero.

    Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685), section 4.1; Biderman et al. 2024, "LoRA Learns Less and
    Forgets Less" (2405.09673). When to use: a pretrained model is adapted and gradients and optimizer states of all
    weights do not fit, or the base must not be forgotten. When not: training from scratch, or a task far from what
    the base knows with much data: training everything learns more.

    Attributes:
        rank: columns of B, rows of A.
        alpha: numerator of the scale; None means 2 x rank.
        dropout: probability of zeroing an input of the update in training; above 0 the fast path is not
            taken.
        target_modules: "all-linear" (every linear layer but the output head), a tuple of name endings, or a
            regular expression for full names.
        exclude_modules: name endings (or an expression) to leave out of these.
        layers_to_transform: numbers of the decoder layers to adapt; None means all.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        lora_plus_ratio: factor on the learning rate of B (the paper recommends about 16); None means 1.
        init: how A and B start: "kaiming" or "gaussian" numbers in A and zeros in B, "pissa" (the base's largest
            singular values, which the base gives up; see `LoRALinear.initialize`), or "loftq" (what quantization has
            lost; the adapter then belongs to a base quantized in the same way).
        modules_to_save: name endings of modules that are trained fully and saved with the adapter
            ("embed_tokens").
    """

    name: ClassVar[str] = "lora"

    use_rslora: bool = False
    lora_plus_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    init: LoraInit | Literal["loftq"] = "kaiming"

    @property
    def scale(self) -> float:
        """What the update B A is multiplied with (LoRA, section 4.1; rsLoRA, theorem 3.2)."""
        return self.effective_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def needs_original_weights(self) -> bool:
        """LoftQ starts from what quantization has lost."""
        return self.init == "loftq"

    @property
    def title(self) -> str:
        """What the user is told that was put on the layers."""
        return ("rs" if self.use_rslora else "") + super().title

    def conflict(self, recipe: Recipe) -> str | None:
        """PiSSA writes into the base weight, which quantization has packed away; LoftQ makes up for quantization."""
        if self.init == "loftq" and recipe.get(Quantize) is None:
            return "lora's init 'loftq' makes up for what 'quantize' loses, but there is none; use 'kaiming' or 'pissa'"
        if self.init == "pissa" and recipe.get(Quantize) is not None:
            return "lora's init 'pissa' changes the base weights, but 'quantize' packs them; use init 'kaiming'"
        return super().conflict(recipe)

    def make_layer(self, run: Run, name: str, layer: nn.Module, generator: torch.Generator) -> LoRALinear:
        """Return a LoRA layer around `layer`."""
        adapted = LoRALinear(layer, self.rank, self.scale, self.dropout)
        original_OI = run.original_weights.pop(name, None)
        if self.init == "loftq" and original_OI is not None:
            start_from_quantization_error(adapted, original_OI)
        else:  # a layer that is not quantized has lost nothing
            adapted.initialize("kaiming" if self.init == "loftq" else self.init, generator)
        return adapted

    def peft_options(self, layer: LoRALinear) -> dict[str, Any]:
        """Return what PEFT's LoraConfig says about rsLoRA."""
        del layer
        return {"use_rslora": self.use_rslora}

    def apply(self, run: Run) -> None:
        """Wrap the target layers; B gets its own learning rate in LoRA+."""
        super().apply(run)
        if self.lora_plus_ratio is not None:
            for name in lora_layers(run.model):
                run.learning_rate_factors[f"{name}.lora_B.weight"] = self.lora_plus_ratio
