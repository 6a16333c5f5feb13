"""Linear layers with an FP8 weight that multiply in FP8 (`layers.fp8`)."""

from __future__ import annotations

import torch
from torch import Tensor

from tunewise.layers import fp8
from tunewise.layers.narrow_linear import NarrowProductLinear, Rows
from tunewise.layers.quantized import Fp8Linear


class Fp8ProductLinear(NarrowProductLinear, Fp8Linear):
    """An Fp8Linear whose products are made in FP8 instead of with the unpacked weight."""

    def rounded(self, input_TI: Tensor) -> Rows:
        """Return the rows of an input as the layer multiplies them."""
        return fp8.quantize_rows(input_TI)

    def raw_product(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Return the output of rounded rows without the bias, (T, O) in `dtype`."""
        return fp8.matmul(rows, self.packed, self.scale.squeeze(1), dtype)

    def rounded_input_gradient(self, grad_TO: Tensor, grad_TI: Tensor | None) -> Tensor:
        """Return the input's gradient, made in FP8; added into `grad_TI` where that is given."""
        rows = fp8.quantize_rows(grad_TO, self.scale.squeeze(1))
        made_TI = fp8.matmul(rows, self.packed, None, grad_TO.dtype, by_columns=True)
        return made_TI if grad_TI is None else grad_TI.add_(made_TI)

    def shares_rows_with(self, other: NarrowProductLinear) -> bool:
        """Whether both round the same input to the same rows."""
        return isinstance(other, Fp8ProductLinear)
