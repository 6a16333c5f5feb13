"""The bottleneck adapter: a small network with a residual connection behind a frozen linear layer.

    y = h + s * U f(D h + d) + u,   h = base(x)        Houlsby et al. 2019 (arXiv 1902.00751), section 2.1

Shape suffixes: T tokens (any leading dimensions), O out_features, S size of the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunewise.layers.linear import any_tensor, has_values

Activation = Literal["relu", "gelu", "silu"]


class Projection(nn.Module):
    """Weight and bias of one of the two layers; no nn.Linear, so that nothing takes it for a layer of the model."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, input: Tensor) -> Tensor:
        """Compute in the input's dtype."""
        return functional.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Bottleneck(nn.Module):
    """A `base_layer` (of any kind, with or without a low-rank update) and an adapter behind it.

    Attributes:
        base_layer: the layer that stood here.
        adapter_down: D and d, weight (S, O).
        adapter_up: U and u, weight (O, S).
        activation: f.
        scale: s.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        out_features: int,
        size: int,
        activation: Activation,
        scale: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap `base_layer`; everything is zero until `initialize` is called."""
        super().__init__()
        self.base_layer = base_layer
        self.activation, self.scale = activation, scale
        like = any_tensor(base_layer)
        self.adapter_down = Projection(
            like.new_zeros((size, out_features), dtype=dtype), like.new_zeros(size, dtype=dtype)
        )
        self.adapter_up = Projection(
            like.new_zeros((out_features, size), dtype=dtype), like.new_zeros(out_features, dtype=dtype)
        )

    @property
    def weight(self) -> Tensor:
        """The base layer's stored weight: some models ask their layers for its dtype or device."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw D uniformly (Kaiming), on the CPU; U stays zero, so the layer starts as its base."""
        weight_SO = self.adapter_down.weight
        if has_values(weight_SO):
            drawn_SO = torch.empty(weight_SO.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(drawn_SO, a=math.sqrt(5), generator=generator)
            weight_SO.copy_(drawn_SO)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        hidden_TO: Tensor = self.base_layer(input)
        low_TS = getattr(functional, self.activation)(self.adapter_down(hidden_TO))
        output_TO: Tensor = hidden_TO + self.scale * self.adapter_up(low_TS)
        return output_TO

    def extra_repr(self) -> str:
        """Describe the adapter in print(model)."""
        return f"size={len(self.adapter_down.bias)}, activation={self.activation}, scale={self.scale:g}"


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """Return the model's bottleneck adapters by the names of the layers behind which they stand."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """Return a function from the name of a module or tensor of the model to its name without bottleneck adapters."""
    wrapped = {f"{name}.base_layer": name for name in bottlenecks(model)}

    def plain(name: str) -> str:
        for inner, outer in wrapped.items():
            if name == inner or name.startswith(inner + "."):
                return outer + name.removeprefix(inner)
        return name

    return plain
