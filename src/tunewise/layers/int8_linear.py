"""Linear layers with an int8 weight that multiply in 8 bits: the input's rows are rounded when they arrive.

    y = x_q W_q^T * s_x s_W + b        dL/dx = (dL/dy * s_W)_q W_q * s        (`layers.int8`)

The gradient passes the rounding as if it were not there.

Shape suffixes: T tokens (all leading dimensions), I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunewise.layers.int8 import Rows, add_matmul_, matmul, quantize_rows
from tunewise.layers.linear import compute_dtype, without_view
from tunewise.layers.quantized import Int8Linear


class Int8ProductLinear(Int8Linear):
    """An Int8Linear whose products are made in 8 bits instead of with the unpacked weight.

    Attributes:
        uses_kernel: whether the compiled kernels make them, or torch's own operations.
        is_exact: whether the weight is unpacked after all, see `unpacked_products`.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Pack the weight of `layer`; of a layer without values (a dry run) only the storage is made."""
        super().__init__(layer)
        self.packed = self.packed.contiguous()  # a Conv1D's is not
        self.uses_kernel = False
        self.is_exact = False

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) in autocast's dtype, or else the input's."""
        if self.is_exact:
            return super().forward(input)
        output: Tensor = _Int8ProductFunction.apply(input, self.bias, self, compute_dtype(input))
        return output

    def rounded(self, input_TI: Tensor) -> Rows:
        """Return the rows of an input as the layer multiplies them."""
        return quantize_rows(input_TI, self.uses_kernel)

    def product(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Return the output of rounded rows, (T, O) in `dtype`."""
        output_TO = matmul(rows, self.packed, self.scale.squeeze(1), dtype, self.uses_kernel)
        return output_TO if self.bias is None else output_TO.add_(self.bias.to(dtype))

    def add_input_gradient(self, grad_TO: Tensor, grad_TI: Tensor | None) -> Tensor:
        """Return the input's gradient, made in 8 bits; added into `grad_TI` where that is given."""
        if self.is_exact:
            return super().add_input_gradient(grad_TO, grad_TI)
        rows = quantize_rows(grad_TO, self.uses_kernel, self.scale.squeeze(1))
        if grad_TI is not None:
            return add_matmul_(grad_TI, rows, self.packed, self.uses_kernel)
        return matmul(rows, self.packed, None, grad_TO.dtype, self.uses_kernel, by_columns=True)


def outputs_of(layers: Sequence[nn.Module], input_TI: Tensor) -> list[Tensor]:
    """Return every layer's output of the same input; 8-bit products share its rounded rows."""
    alike = [layer for layer in layers if isinstance(layer, Int8ProductLinear) and not layer.is_exact]
    if len(alike) < len(layers) or len({layer.uses_kernel for layer in alike}) > 1:
        return [layer(input_TI) for layer in layers]
    rows = alike[0].rounded(input_TI)
    return [layer.product(rows, input_TI.dtype) for layer in alike]


@contextmanager
def unpacked_products(module: nn.Module) -> Iterator[None]:
    """Let 8-bit products inside `module` be made with the unpacked weight: for comparing what is around them.

    Two ways to the same input differ by rounding, and where that carries a number over the edge between two steps of
    eight bits, the outputs differ by more than rounding.
    """
    layers = [part for part in module.modules() if isinstance(part, Int8ProductLinear) and not part.is_exact]
    for layer in layers:
        layer.is_exact = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_exact = False


class _Int8ProductFunction(torch.autograd.Function):
    """Keeps nothing; the gradient goes through the rounding as if it were not there."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: Int8ProductLinear, dtype: torch.dtype) -> Tensor:
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
