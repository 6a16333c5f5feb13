"""DyLoRA: one training that serves every rank; over a quantized base it is QDyLoRA.

Papers: DyLoRA, Valipour et al. 2022 (arXiv 2210.07558); QDyLoRA, Rajabzadeh et al. 2024 (2402.10462).
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from tunewise.layers.dylora import DyLoRALinear, dylora_layers
from tunewise.methods.low_rank import LowRank, derived_seed
from tunewise.methods.method import Run
from tunewise.recipe import PositiveInt


class DyLoRA(LowRank):
    """Low-rank adaptation of which every smaller rank is usable as well.

    Formula: y = W x + (alpha / b) B[:, :b] A[:b] x, where each step draws one rank b for all layers; validation uses
    the largest. `tunewise export RUN --rank R` writes the first R ranks as an ordinary PEFT LoRA adapter. With
    'quantize' in the recipe this is QDyLoRA.

    Source: Valipour et al. 2022 (arXiv 2210.07558), equation 7; QDyLoRA, Rajabzadeh et al. 2024 (2402.10462), draws
    from 1, 2, 4, ..., 64. What lies beyond b gets a gradient of zero; as in the authors' code the optimizer's momentum
    still moves it. When to use: the rank is to be chosen after training, or by the device that will run it. When not:
    the rank is known; a plain 'lora' of that rank learns more in the same steps.

    Attributes:
        rank: the largest rank.
        alpha: numerator of the scale; None means rank.
        ranks: the ranks that are drawn, each as often; None means 1, 2, 3, ..., rank.
        scale_by_rank: scale by alpha / b (the paper); false: by alpha / rank whatever b is.
        dropout, target_modules, exclude_modules, layers_to_transform, modules_to_save: as in `lora`.
    """

    name: ClassVar[str] = "dylora"

    ranks: tuple[PositiveInt, ...] | None = None
    scale_by_rank: bool = True

    @model_validator(mode="after")
    def _ranks_that_exist(self) -> Self:
        if self.ranks is not None and (not self.ranks or max(self.ranks) > self.rank):
            raise ValueError(f"'ranks' must name some of 1 to {self.rank}, the largest rank")
        return self

    @property
    def effective_alpha(self) -> float:
        """Alpha, with its default filled in."""
        return float(self.rank) if self.alpha is None else self.alpha

    def make_layer(self, run: Run, name: str, layer: nn.Module, generator: torch.Generator) -> DyLoRALinear:
        """Return a layer whose factors can be cut."""
        del run, name
        adapted = DyLoRALinear(layer, self.rank, self.effective_alpha, self.scale_by_rank, self.dropout)
        adapted.initialize("kaiming", generator)
        return adapted

    def apply(self, run: Run) -> None:
        """Wrap the target layers and draw a rank before each step; a dry run sees the largest, which needs most."""
        super().apply(run)
        if not run.is_dry:
            ranks = self.ranks or tuple(range(1, self.rank + 1))
            run.companions[self.name] = _RankDraw(run.model, ranks, run.recipe.seed)


class _RankDraw:
    """Draws the rank of a step from a generator that is seeded by the recipe's seed and the step's number.

    So the rank follows from what every checkpoint holds, also after a step that was repeated in a smaller layout.
    """

    def __init__(self, model: nn.Module, ranks: tuple[int, ...], seed: int) -> None:
        self._layers, self._ranks, self._seed = list(dylora_layers(model).values()), ranks, seed

    def begin_step(self, step: int, num_steps: int | None) -> None:
        """Set the rank of all layers."""
        del num_steps
        generator = torch.Generator().manual_seed(derived_seed(self._seed, f"dylora:{step}"))
        rank = self._ranks[int(torch.randint(len(self._ranks), (), generator=generator))]
        for layer in self._layers:
            layer.active_rank = rank

    def after_update(self) -> None:
        """Nothing to look at."""

    def state(self) -> dict[str, Tensor]:
        """Nothing to keep: the step's number says all."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Use the largest rank until the next step begins."""
        del state
        for layer in self._layers:
            layer.active_rank = layer.rank
