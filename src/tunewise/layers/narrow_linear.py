"""Linear layers that multiply in the narrow numbers in which their weight is stored (`int8_linear`, `fp8_linear`).

The input's rows are rounded when they arrive, and so are the rows of the output's gradient:

    y = x_q W_q^T * s_x s_W + b        dL/dx = (dL/dy * s_W)_q W_q * s

with a scale s of each row. The gradient passes the rounding as if it were not there (SwitchBack, Wortsman et al. 2023,
arXiv 2304.13013, without its gradient of the weight, which here is frozen).

Shape suffixes: T tokens (all leading dimensions), I in_features, O out_features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunewise.layers.linear import compute_dtype, without_view
from tunewise.layers.quantized import QuantizedLinear

Rows = tuple[Tensor, Tensor]
"""Rounded rows (T, features), and the scale of each, fp32 (T,)."""


class NarrowProductLinear(QuantizedLinear):
    """Comes before the class that stores the weight, whose products with the unpacked weight it replaces.

    Attributes:
        is_exact: whether the weight is unpacked after all, see `unpacked_products`.
    """

    is_exact: bool = False

    @abstractmethod
    def rounded(self, input_TI: Tensor) -> Rows:
        """Return the rows of an input as the layer multiplies them."""

    @abstractmethod
    def raw_product(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Return the output of rounded rows without the bias, (T, O) in `dtype`."""

    @abstractmethod
    def rounded_input_gradient(self, grad_TO: Tensor, grad_TI: Tensor | None) -> Tensor:
        """Return the input's gradient, made of rounded rows; added into `grad_TI` where that is given."""

    @abstractmethod
    def shares_rows_with(self, other: NarrowProductLinear) -> bool:
        """Whether both round the same input to the same rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) in autocast's dtype, or else the input's."""
        if self.is_exact:
            return super().forward(input)
        output: Tensor = _NarrowProductFunction.apply(input, self.bias, self, compute_dtype(input))
        return output

    def product(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Return the output of rounded rows, (T, O) in `dtype`."""
        output_TO = self.raw_product(rows, dtype)
        return output_TO if self.bias is None else output_TO.add_(self.bias.to(dtype))

    def add_input_gradient(self, grad_TO: Tensor, grad_TI: Tensor | None) -> Tensor:
        """Return the input's gradient; added into `grad_TI` where that is given."""
        if self.is_exact:
            return super().add_input_gradient(grad_TO, grad_TI)
        return self.rounded_input_gradient(grad_TO, grad_TI)


def outputs_of(layers: Sequence[nn.Module], input_TI: Tensor) -> list[Tensor]:
    """Return every layer's output of the same input; narrow products share its rounded rows."""
    narrow = [layer for layer in layers if isinstance(layer, NarrowProductLinear) and not layer.is_exact]
    if len(narrow) < len(layers) or not all(layer.shares_rows_with(narrow[0]) for layer in narrow):
        return [layer(input_TI) for layer in layers]
    rows = narrow[0].rounded(input_TI)
    return [layer.product(rows, input_TI.dtype) for layer in narrow]


@contextmanager
def unpacked_products(module: nn.Module) -> Iterator[None]:
    """Let narrow products inside `module` be made with the unpacked weight: for comparing what is around them.

    Two ways to the same input differ by rounding, and where that carries a number over the edge between two narrow
    numbers, the outputs differ by more than rounding.
    """
    layers = [part for part in module.modules() if isinstance(part, NarrowProductLinear) and not part.is_exact]
    for layer in layers:
        layer.is_exact = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_exact = False


class _NarrowProductFunction(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: NarrowProductLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.shape, ctx.input_dtype = layer, input.shape, input.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        rows = layer.rounded(input.reshape(-1, input.shape[-1]).to(dtype))
        return without_view(layer.product(rows, dtype).view(*input.shape[:-1], layer.out_features))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = ctx.layer.add_input_gradient(grad_TO, None).view(ctx.shape).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_TO.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_input, grad_bias, None, None
