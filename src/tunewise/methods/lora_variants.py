"""Variants of LoRA that change its layer: DoRA and LoRA-FA."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tunewise.layers.dora import DoRALinear
from tunewise.layers.lora import LoRALinear
from tunewise.layers.lora_fa import LoRAFALinear
from tunewise.methods.low_rank import LowRank
from tunewise.methods.method import Run


class DoRA(LowRank):
    """Low-rank adaptation of the directions of a weight's rows, with a trained length m for each row.

    Formula: y = m (W + s B A) x / |W + s B A|, row by row, the norm being a constant to the gradient; written and read
    in PEFT's file format (use_dora).

    Source: Liu et al. 2024, "DoRA" (arXiv 2402.09353), equation 5 and section 4.3. When to use: small ranks, where the
    paper finds it ahead of LoRA. When not: speed or memory matter; every step multiplies the weight with A once more
    and keeps one more output of each layer.

    Attributes:
        rank: columns of B, rows of A.
        alpha: numerator of the scale s = alpha / rank; None means 2 x rank.
        dropout: probability of zeroing an input of the update B A in training; the base's input stays whole (peft 0.21
            lets the base see the zeros too).
        target_modules, exclude_modules, layers_to_transform, modules_to_save: as in `lora`.
    """

    name: ClassVar[str] = "dora"

    def make_layer(self, run: Run, name: str, layer: nn.Module, generator: torch.Generator) -> DoRALinear:
        """Return a DoRA layer around `layer`."""
        del run, name
        adapted = DoRALinear(layer, self.rank, self.effective_alpha / self.rank, self.dropout)
        adapted.initialize("kaiming", generator)
        return adapted

    def peft_options(self, layer: LoRALinear) -> dict[str, Any]:
        """Return what PEFT's LoraConfig says about DoRA."""
        del layer
        return {"use_dora": True}


class LoRAFA(LowRank):
    """Low-rank adaptation with a frozen A: only B is trained, and of a layer's input only x A^T is kept.

    Formula: y = W x + s B (A x), A as it was drawn. Half the optimizer's state of `lora`, and rank instead of
    in_features numbers a token and layer to keep for the backward pass; written in PEFT's file format as a plain LoRA.

    Source: Zhang et al. 2023, "LoRA-FA" (arXiv 2308.03303), section 3. When to use: activations fill the memory and
    checkpointing is too slow. When not: checkpointing is on anyway (then nothing is saved), or the rank is small: the
    update cannot leave the rows of A that were drawn.

    Attributes:
        rank: columns of B, rows of A.
        alpha: numerator of the scale s = alpha / rank; None means 2 x rank.
        dropout: probability of zeroing an input of the update in training; above 0 the input is kept.
        target_modules, exclude_modules, layers_to_transform, modules_to_save: as in `lora`.
    """

    name: ClassVar[str] = "lora_fa"

    def make_layer(self, run: Run, name: str, layer: nn.Module, generator: torch.Generator) -> LoRAFALinear:
        """Return a LoRA-FA layer around `layer`."""
        del run, name
        adapted = LoRAFALinear(layer, self.rank, self.effective_alpha / self.rank, self.dropout)
        adapted.initialize("kaiming", generator)
        return adapted
