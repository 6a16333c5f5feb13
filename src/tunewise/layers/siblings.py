"""LoRA layers that read the same input (queries, keys and values; gate and up) and the gated MLP, each as one function.

    y_i = base_i(x) + s_i (x A_i^T) B_i^T        for every sibling i, with one product for all A_i

Composed of single LoRA layers, each sibling reads x for its A, reads it again in backward, and writes a gradient of x
of its own that autograd adds up. Here x meets all A together, and the gradients are added inside the products.

Shape suffixes: T tokens, I in_features, O out_features, R rank, X all siblings' ranks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunewise.layers import thin
from tunewise.layers.fused import SwiGLU, can_compute, swiglu, swiglu_backward_
from tunewise.layers.linear import add_input_gradient, compute_dtype, without_view
from tunewise.layers.lora import LoRALinear
from tunewise.layers.narrow_linear import outputs_of


def are_plain_lora(layers: Sequence[nn.Module]) -> bool:
    """Say whether all layers are LoRA over frozen ones, at present on, without dropout, and may be updated in place."""
    return all(
        type(layer) is LoRALinear  # its relatives compute something else
        and layer.in_place
        and not layer.is_off
        and not (layer.training and layer.dropout > 0.0)
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        for layer in layers
    )


def siblings(input: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Return every layer's output of the same input (..., I)."""
    if not are_plain_lora(layers):
        return tuple(layer(input) for layer in layers)
    outputs: tuple[Tensor, ...] = _Siblings.apply(input, tuple(layers), *_factors(layers))
    return outputs


def gated_mlp(input: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """Return down(silu(gate(x)) * up(x)); of its inside only the outputs of gate and up are kept."""
    if are_plain_lora((gate, up, down)):
        output: Tensor = _GatedMLP.apply(input, (gate, up, down), *_factors((gate, up, down)))
        return output
    gated, upped = siblings(input, (gate, up))
    if not can_compute(gated, upped):
        return down(nn.functional.silu(gated) * upped)  # type: ignore[no-any-return]
    product: Tensor = SwiGLU.apply(gated.contiguous(), upped.contiguous())
    return down(product)  # type: ignore[no-any-return]


def _factors(layers: Sequence[nn.Module]) -> list[Tensor]:
    found: list[Tensor] = []
    for layer in layers:
        assert isinstance(layer, LoRALinear)
        found += [layer.lora_A.weight, layer.lora_B.weight]
    return found


class _Group:
    """Siblings and their factors in the dtype of the products; every method takes and returns plain tensors."""

    def __init__(self, layers: Sequence[LoRALinear], factors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.layers = layers
        self.a_XI = torch.cat([a_RI.to(dtype) for a_RI in factors[0::2]])
        self.b_OR = [b_OR.to(dtype) for b_OR in factors[1::2]]
        ends = [0]
        for layer in layers:
            ends.append(ends[-1] + layer.rank)
        self.parts = [slice(start, end) for start, end in pairwise(ends)]

    def forward(self, input_TI: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return x A^T of all siblings, (T, X), and their outputs."""
        low_TX = thin.product(input_TI, self.a_XI)
        outputs = outputs_of([layer.base_layer for layer in self.layers], input_TI)
        for layer, output_TO, b_OR, part in zip(self.layers, outputs, self.b_OR, self.parts, strict=True):
            thin.update_(output_TO, low_TX[:, part], b_OR, by_columns=False, scale=layer.scale)
        return low_TX, outputs

    def backward(
        self, grads: Sequence[Tensor], input_TI: Tensor, low_TX: Tensor, needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradient of the input (None where nobody needs it) and those of A and B of every sibling."""
        grad_low_TX = torch.empty_like(low_TX)
        grad_TI: Tensor | None = None
        found: list[Tensor] = []
        for layer, grad_TO, b_OR, part in zip(self.layers, grads, self.b_OR, self.parts, strict=True):
            ends = (low_TX[:, part], b_OR, grad_low_TX[:, part])
            found.append(thin.gradient_and_product_(grad_TO, *ends, layer.scale).T)
            if needs_input:
                grad_TI = add_input_gradient(layer.base_layer, grad_TO, grad_TI)
        if grad_TI is not None:
            thin.update_(grad_TI, grad_low_TX, self.a_XI, by_columns=True)
        grad_a_XI = thin.gradient(input_TI, grad_low_TX)
        factors: list[Tensor] = []
        for part, grad_b_OR in zip(self.parts, found, strict=True):
            factors += [grad_a_XI[part], grad_b_OR]
        return grad_TI, factors


def _as_stored(gradients: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients in the dtypes of their factors, each dense and in memory of its own."""
    return [
        gradient.to(factor.dtype, memory_format=torch.contiguous_format, copy=True)
        for gradient, factor in zip(gradients, factors, strict=True)
    ]


class _Siblings(torch.autograd.Function):
    """Keeps the input and x A^T."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layers: tuple[LoRALinear, ...], *factors: Tensor) -> tuple[Tensor, ...]:
        dtype = compute_dtype(input)
        input_TI = input.reshape(-1, input.shape[-1]).to(dtype)
        low_TX, outputs = _Group(layers, factors, dtype).forward(input_TI)
        ctx.save_for_backward(input_TI, low_TX, *factors)
        ctx.layers, ctx.shape, ctx.dtype = layers, input.shape, input.dtype
        return tuple(without_view(output.view(*input.shape[:-1], output.shape[-1])) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        input_TI, low_TX, *factors = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        group = _Group(ctx.layers, factors, input_TI.dtype)
        grad_TI, found = group.backward(grads, input_TI, low_TX, ctx.needs_input_grad[0])
        grad_input = None if grad_TI is None else grad_TI.view(ctx.shape).to(ctx.dtype)
        return grad_input, None, *_as_stored(found, factors)


class _GatedMLP(torch.autograd.Function):
    """Keeps the input and the outputs of gate and up; their product is made again in backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layers: tuple[LoRALinear, ...], *factors: Tensor) -> Tensor:
        dtype = compute_dtype(input)
        input_TI = input.reshape(-1, input.shape[-1]).to(dtype)
        low_TX, (gate_TO, up_TO) = _Group(layers[:2], factors[:4], dtype).forward(input_TI)
        low_TR, (output_TI,) = _Group(layers[2:], factors[4:], dtype).forward(swiglu(gate_TO, up_TO))
        ctx.save_for_backward(input_TI, gate_TO, up_TO, low_TX, low_TR, *factors)
        ctx.layers, ctx.shape, ctx.dtype = layers, input.shape, input.dtype
        return without_view(output_TI.view(*input.shape[:-1], output_TI.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        input_TI, gate_TO, up_TO, low_TX, low_TR, *factors = ctx.saved_tensors
        grad_TI = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        dtype = input_TI.dtype
        down = _Group(ctx.layers[2:], factors[4:], dtype)
        grad_product_TO, of_down = down.backward([grad_TI], swiglu(gate_TO, up_TO), low_TR, True)
        assert grad_product_TO is not None
        swiglu_backward_(grad_product_TO, gate_TO, up_TO)  # what was kept is used up: the gradients take its place
        del grad_product_TO
        inner = _Group(ctx.layers[:2], factors[:4], dtype)
        grad, of_inner = inner.backward([gate_TO, up_TO], input_TI, low_TX, ctx.needs_input_grad[0])
        grad_input = None if grad is None else grad.view(ctx.shape).to(ctx.dtype)
        return grad_input, None, *_as_stored([*of_inner, *of_down], factors)
