"""QA-LoRA: an adapter over 4, 3 or 2 bits that merges into the same bits, exactly.

Paper: Xu et al. 2023, "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models" (arXiv 2309.14717).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tunewise.errors import Conflict
from tunewise.layers.group_quantized import GROUP_KINDS, GroupQuantizedLinear
from tunewise.layers.lora import LoRALinear
from tunewise.layers.qalora import QALoRALinear
from tunewise.methods.low_rank import LowRank
from tunewise.methods.method import Run
from tunewise.methods.quantization import Quantize
from tunewise.recipe import Recipe


class QALoRA(LowRank):
    """Low-rank adaptation of a group-quantized base whose merged model has the same few bits.

    Formula: y = W x + s (I / L^2) B A sums(x), where sums(x) adds the inputs of each quantization group: the update is
    constant inside a group, so merging moves the group's offset and nothing else. `tunewise export RUN --merged DIR`
    writes the merged model still quantized, in the format that docs/quantized-format.md describes;
    `tunewise.load_quantized` reads it. The adapter by itself is in PEFT's format (use_qalora), which peft 0.21 applies
    to GPTQ layers only.

    Source: Xu et al. 2023 (arXiv 2309.14717), algorithm 1; the base is rounded to nearest, where the paper uses
    GPTQ. When to use: the model will be run in 4, 3 or 2 bits. When not: it will be run in 16 bits ('lora' over
    'quantize' nf4 has the better base and an update that is free inside the groups), or its groups are so large that
    few numbers are left to learn.

    Attributes:
        rank: columns of B, rows of A.
        alpha: numerator of the scale s = alpha / rank; None means 2 x rank.
        dropout, target_modules, exclude_modules, layers_to_transform, modules_to_save: as in `lora`.
    """

    name: ClassVar[str] = "qalora"

    def conflict(self, recipe: Recipe) -> str | None:
        """There must be groups to be constant in."""
        quantize = recipe.get(Quantize)
        if quantize is None or quantize.kind not in GROUP_KINDS:
            return f"qalora adapts groups of integers; add 'quantize' with one of the kinds {', '.join(GROUP_KINDS)}"
        return super().conflict(recipe)

    def make_layer(self, run: Run, name: str, layer: nn.Module, generator: torch.Generator) -> QALoRALinear:
        """Return a QA-LoRA layer around `layer`.

        Raises:
            Conflict: the layer was left out of quantization.
        """
        del run
        if not isinstance(layer, GroupQuantizedLinear):
            raise Conflict(
                f"qalora: '{name}' is not quantized, so it has no groups. Put it into qalora.exclude_modules, or take "
                "it out of quantize.skip_modules."
            )
        adapted = QALoRALinear(layer, self.rank, self.effective_alpha / self.rank, self.dropout)
        adapted.initialize("kaiming", generator)
        return adapted

    def peft_options(self, layer: LoRALinear) -> dict[str, Any]:
        """Return what PEFT's LoraConfig says about QA-LoRA."""
        assert isinstance(layer, QALoRALinear)
        return {"use_qalora": True, "qalora_group_size": layer.base_layer.group_size}
