"""Linear layers with an int8 weight that multiply in 8-bit integers (`layers.int8`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunewise.layers.int8 import add_matmul_, matmul, quantize_rows
from tunewise.layers.narrow_linear import NarrowProductLinear, Rows
from tunewise.layers.quantized import Int8Linear


class Int8ProductLinear(NarrowProductLinear, Int8Linear):
    """An Int8Linear whose products are made in 8-bit integers instead of with the unpacked weight.

    Attributes:
        uses_kernel: whether the compiled kernels make them, or torch's own operations.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Pack the weight of `layer`; of a layer without values (a dry run) only the storage is made."""
        super().__init__(layer)
        self.packed = self.packed.contiguous()  # a Conv1D's is not
        self.uses_kernel = False

    def rounded(self, input_TI: Tensor) -> Rows:
        """Return the rows of an input as the layer multiplies them."""
        return quantize_rows(input_TI, self.uses_kernel)

    def raw_product(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Return the output of rounded rows without the bias, (T, O) in `dtype`."""
        return matmul(rows, self.packed, self.scale.squeeze(1), dtype, self.uses_kernel)

    def rounded_input_gradient(self, grad_TO: Tensor, grad_TI: Tensor | None) -> Tensor:
        """Return the input's gradient, made in 8 bits; added into `grad_TI` where that is given."""
        rows = quantize_rows(grad_TO, self.uses_kernel, self.scale.squeeze(1))
        if grad_TI is not None:
            return add_matmul_(grad_TI, rows, self.packed, self.uses_kernel)
        return matmul(rows, self.packed, None, grad_TO.dtype, self.uses_kernel, by_columns=True)

    def shares_rows_with(self, other: NarrowProductLinear) -> bool:
        """Whether both round the same input to the same rows."""
        return isinstance(other, Int8ProductLinear) and self.uses_kernel == other.uses_kernel
