"""The DoRA layer: a LoRA layer whose rows keep a length of their own.

    y = (m / |W + s B A|) * ((W + s B A) x) + bias        Liu et al. 2024 (arXiv 2402.09353), equation 5

The norm |.| of a row is a constant to the gradient (section 4.3). It is computed without the sum W + s B A:

    |w + u|^2 = |w|^2 + 2 w u + |u|^2,   w u = s rows((W A^T) * B),   |u|^2 = s^2 rows((B A A^T) * B)

Shape suffixes: T tokens (any leading dimensions), I in_features, O out_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunewise.layers.linear import has_values, weight_of
from tunewise.layers.lora import LoraInit, LoRALinear


class DoRALinear(LoRALinear):
    """A frozen `base_layer` with a low-rank update of its directions and a trained length of each row.

    Attributes:
        lora_magnitude_vector: m, the lengths, shape (out_features,); named as in PEFT.
        squares: the squared lengths of the base's rows, fp32 (out_features,).
    """

    squares: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap `base_layer`; A, B and m are zero until `initialize` is called."""
        super().__init__(base_layer, rank, scale, dropout, dtype)
        self.lora_magnitude_vector = nn.Parameter(self.lora_B.weight.detach().new_zeros(self.out_features))
        self.register_buffer("squares", self.lora_B.weight.detach().new_zeros(self.out_features), persistent=False)

    @torch.no_grad()
    def initialize(self, init: LoraInit, generator: torch.Generator | None = None) -> None:
        """Draw A, set B to zero and m to the lengths of the base's rows, so that the layer starts as its base."""
        super().initialize(init, generator)
        if has_values(self.squares):
            self.squares.copy_(weight_of(self.base_layer, self.squares.dtype).square().sum(dim=1))
            self.lora_magnitude_vector.copy_(self.squares.sqrt())

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        output: Tensor = self.base_layer(input)
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        dtype = output.dtype
        if bias is not None:
            output = output - bias.to(dtype)
        dropped = functional.dropout(input, self.dropout) if self.training and self.dropout > 0.0 else input
        low_TR = functional.linear(dropped.to(dtype), self.lora_A.weight.to(dtype))
        output = output + self.scale * functional.linear(low_TR, self.lora_B.weight.to(dtype))
        output = output * (self.lora_magnitude_vector / self.norms()).to(dtype)
        return output if bias is None else output + bias.to(dtype)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the lengths of the rows of W + s B A, (out_features,)."""
        a_RI, b_OR = self.lora_A.weight, self.lora_B.weight
        across_OR = weight_of(self.base_layer, a_RI.dtype) @ a_RI.T
        update_OR = self.scale * b_OR
        squares_O = self.squares + ((2 * across_OR + update_OR @ (a_RI @ a_RI.T)) * update_OR).sum(dim=1)
        return squares_O.clamp_min(torch.finfo(squares_O.dtype).tiny).sqrt()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight with update and lengths in fp32 (fp64 for an fp64 base), shape (out, in)."""
        weight_OI = super().merged_weight()
        return weight_OI * (self.lora_magnitude_vector / self.norms()).to(weight_OI)[:, None]
