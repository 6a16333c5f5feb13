"""The QA-LoRA layer: a low-rank update that is constant inside each group of a quantized base, so it merges exactly.

    y = base(x) + s * (I / L^2) * (sums(x) A^T) B^T,   sums(x)_g the sum of group g's inputs

Xu et al. 2023, "QA-LoRA" (arXiv 2309.14717), algorithm 1. The factor I / L^2 is PEFT's (the mean of a group times the
number of groups), so that its files mean the same here. Merging adds s * (I / L^2) * B A to the base's offsets: the
codes and scales stay, and so does the number of bits.

Shape suffixes: T tokens (any leading dimensions), I in_features, O out_features, R rank, G groups, L inputs of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tunewise.layers.group_quantized import GroupQuantizedLinear
from tunewise.layers.lora import Factor, LoRALinear


class QALoRALinear(LoRALinear):
    """A group-quantized `base_layer` with a low-rank update over its groups.

    Attributes:
        lora_A: factor of shape (rank, groups).
        lora_B: factor of shape (out_features, rank).
    """

    base_layer: GroupQuantizedLinear

    def __init__(
        self,
        base_layer: GroupQuantizedLinear,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap `base_layer`; A and B are zero until `initialize` is called."""
        super().__init__(base_layer, rank, scale, dropout, dtype)
        self.lora_A = Factor(base_layer.offset.new_zeros((rank, base_layer.num_groups), dtype=dtype))

    @property
    def group_scale(self) -> float:
        """What B A is multiplied with to become the update of every weight of a group."""
        return self.scale * self.in_features / self.base_layer.group_size**2

    @property
    def weight(self) -> Tensor:
        """A stored tensor of the base: some models ask their layers for a dtype or device."""
        return self.base_layer.offset

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        output: Tensor = self.base_layer(input)
        drops = self.training and self.dropout > 0.0
        dropped = functional.dropout(input, self.dropout) if drops else input
        sums_TG = group_sums(dropped.to(output.dtype), self.base_layer.group_size)
        low_TR = functional.linear(sums_TG, self.lora_A.weight.to(output.dtype))
        return output + self.group_scale * functional.linear(low_TR, self.lora_B.weight.to(output.dtype))

    @torch.no_grad()
    def update_of_groups(self) -> Tensor:
        """Return the update of every weight of a group, (out_features, groups), in fp32."""
        return self.group_scale * self.lora_B.weight.float() @ self.lora_A.weight.float()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight with its update in fp32, shape (out_features, in_features)."""
        return self.merge().dense_weight(torch.float32)

    def merge(self, dtype: torch.dtype | None = None) -> GroupQuantizedLinear:
        """Return a base layer of the same bits whose offsets hold the update; `dtype` does not matter to it."""
        del dtype
        return self.base_layer.shifted(self.update_of_groups())


def group_sums(input: Tensor, group_size: int) -> Tensor:
    """Sum the last dimension in groups: (..., I) to (..., G); the last group may be shorter."""
    missing = -input.shape[-1] % group_size
    padded = functional.pad(input, (0, missing)) if missing else input
    sums: Tensor = padded.unflatten(-1, (-1, group_size)).sum(dim=-1)
    return sums
