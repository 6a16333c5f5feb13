"""The DyLoRA layer: a LoRA layer of which a step uses only the first rows of A and columns of B.

    y = base(x) + s_b * (x A[:b]^T) B[:, :b]^T,   s_b = alpha / b    Valipour et al. 2022 (arXiv 2210.07558), eq. 7

What lies beyond the rank b gets a gradient of zero, so the first ranks learn to do without the later ones, and one
training serves every rank up to the largest.

Shape suffixes: I in_features, O out_features, R the largest rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunewise.layers.lora import LoRALinear, lora_linear, lora_linear_reference


class DyLoRALinear(LoRALinear):
    """A frozen `base_layer` with factors that can be cut to any rank.

    Attributes:
        active_rank: the rank of the present step; evaluation always uses the largest.
        scale_by_rank: whether the scale is alpha / b (the paper's), or alpha / R at every rank.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float,
        scale_by_rank: bool,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap `base_layer` with factors of the largest rank `rank`, which is active."""
        super().__init__(base_layer, rank, alpha / rank, dropout, dtype)
        self.alpha, self.scale_by_rank, self.active_rank = alpha, scale_by_rank, rank

    def scale_of(self, rank: int) -> float:
        """Return what an update cut to `rank` is multiplied with."""
        return self.alpha / rank if self.scale_by_rank else self.scale

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        rank = self.active_rank if self.training else self.rank
        a_RI, b_OR, scale = self.lora_A.weight[:rank], self.lora_B.weight[:, :rank], self.scale_of(rank)
        drops = self.training and self.dropout > 0.0
        if drops or any(parameter.requires_grad for parameter in self.base_layer.parameters()):
            dropout = self.dropout if drops else 0.0
            return lora_linear_reference(input, self.base_layer, a_RI, b_OR, scale, dropout)
        return lora_linear(input, self.base_layer, a_RI, b_OR, scale, in_place=self.in_place)

    def cut(self, rank: int) -> LoRALinear:
        """Return a plain LoRA layer on the same base that holds copies of the first `rank` ranks."""
        layer = LoRALinear(self.base_layer, rank, self.scale_of(rank), self.dropout, self.lora_A.weight.dtype)
        with torch.no_grad():
            layer.lora_A.weight.copy_(self.lora_A.weight[:rank])
            layer.lora_B.weight.copy_(self.lora_B.weight[:, :rank])
        return layer

    def extra_repr(self) -> str:
        """Describe the update in print(model)."""
        return f"{super().extra_repr()}, active_rank={self.active_rank}"


def dylora_layers(model: nn.Module) -> dict[str, DyLoRALinear]:
    """Return the model's DyLoRA layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DyLoRALinear)}


def cut_dylora(model: nn.Module, rank: int) -> None:
    """Replace every DyLoRA layer by the plain LoRA layer of its first `rank` ranks."""
    for name, layer in dylora_layers(model).items():
        model.set_submodule(name, layer.cut(rank).train(layer.training))
