"""The LoRA-FA layer: a LoRA layer whose A is drawn once and never trained.

The gradient of B needs x A^T only, of R numbers a token, so the input of the layer need not be kept (Zhang et al. 2023,
arXiv 2308.03303, section 3).

Shape suffixes: T tokens (all leading dimensions flattened), I in_features, O out_features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunewise.layers.linear import add_input_gradient, without_view
from tunewise.layers.lora import LoRALinear, lora_linear_reference


class LoRAFALinear(LoRALinear):
    """A frozen `base_layer` with an update of which only B is trained."""

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap `base_layer`; A and B are zero until `initialize` is called."""
        super().__init__(base_layer, rank, scale, dropout, dtype)
        self.lora_A.weight.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        a_RI, b_OR = self.lora_A.weight, self.lora_B.weight
        drops = self.training and self.dropout > 0.0
        if drops or any(parameter.requires_grad for parameter in self.base_layer.parameters()):
            dropout = self.dropout if drops else 0.0
            return lora_linear_reference(input, self.base_layer, a_RI, b_OR, self.scale, dropout)
        output: Tensor = _LoRAFAFunction.apply(input, a_RI, b_OR, self.base_layer, self.scale, self.in_place)
        return output


class _LoRAFAFunction(torch.autograd.Function):
    """Keeps x A^T instead of x; in the dtype of the base layer's output."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        lora_A_RI: Tensor,
        lora_B_OR: Tensor,
        base_layer: nn.Module,
        scale: float,
        in_place: bool,
    ) -> Tensor:
        output: Tensor = base_layer(input).contiguous()
        output = output if in_place else output.clone()
        low_TR = input.reshape(-1, input.shape[-1]).to(output.dtype) @ lora_A_RI.to(output.dtype).T
        output.view(-1, output.shape[-1]).addmm_(low_TR, lora_B_OR.to(output.dtype).T, alpha=scale)
        ctx.save_for_backward(low_TR, lora_A_RI, lora_B_OR)
        ctx.base_layer, ctx.scale, ctx.input_like = base_layer, scale, (input.shape, input.dtype)
        return without_view(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        low_TR, lora_A_RI, lora_B_OR = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_input = grad_B_OR = None
        if ctx.needs_input_grad[0]:
            shape, dtype = ctx.input_like
            grad_TI = add_input_gradient(ctx.base_layer, grad_TO)
            grad_TI.addmm_(grad_TO @ lora_B_OR.to(grad.dtype), lora_A_RI.to(grad.dtype), alpha=ctx.scale)
            grad_input = grad_TI.view(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            grad_B_OR = (grad_TO.T @ low_TR).to(lora_B_OR.dtype).mul_(ctx.scale)
        return grad_input, None, grad_B_OR, None, None, None
