"""The compiled kernels as operators of torch, and the autograd functions around them: RMSNorm and SwiGLU.

As operators they can be seen by a dispatch mode and run on fake tensors (a dry run), where only the shapes of their
results count: what they allocate is their result and nothing else.

Shape suffixes: T tokens (all leading dimensions), D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunewise.layers.native import SUFFIXES, call
from tunewise.layers.twins import Twin

_LIBRARY = torch.library.Library("tunewise", "FRAGMENT")


def define(schema: str, kernel: Any, fake: Any) -> Any:
    """Make an operator `tunewise::NAME` of a function for CPU tensors and one for fake tensors; return it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"tunewise::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.tunewise, name).default


def can_compute(*tensors: Tensor) -> bool:
    """Say whether the kernels know these tensors: on the CPU, all of one dtype, fp32 or bf16."""
    return all(t.device.type == "cpu" and t.dtype in SUFFIXES and t.dtype == tensors[0].dtype for t in tensors)


def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y_TD, scale_T = _fake_rms_norm(x_TD, weight_D, eps)
    call("rms_norm", x_TD.dtype, x_TD, weight_D, y_TD, scale_T, *x_TD.shape, eps)
    return y_TD, scale_T


def _fake_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    del weight_D, eps
    return torch.empty_like(x_TD), x_TD.new_empty(x_TD.shape[0], dtype=torch.float32)


def _rms_norm_backward(
    grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, scale_T: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    dx_TD, dw_D = _fake_rms_norm_backward(grad_TD, x_TD, weight_D, scale_T, needs_weight)
    dw = dw_D if needs_weight else None
    call("rms_norm_backward", x_TD.dtype, grad_TD, x_TD, weight_D, scale_T, dx_TD, dw, *x_TD.shape)
    return dx_TD, dw_D


def _fake_rms_norm_backward(
    grad_TD: Tensor, x_TD: Tensor, weight_D: Tensor, scale_T: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    del grad_TD, scale_T
    return torch.empty_like(x_TD), weight_D.new_empty(len(weight_D) if needs_weight else 0, dtype=torch.float32)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    call("swiglu", gate.dtype, gate, up, y, gate.numel())
    return y


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
    call("swiglu_backward", gate.dtype, grad, gate, up, gate_grad, up_grad, gate.numel())
    return gate_grad, up_grad


def _swiglu_backward_(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    call("swiglu_backward", gate.dtype, grad, gate, up, gate, up, gate.numel())


def _cross_entropy_(logits_TV: Tensor, labels_T: Tensor, scale: float) -> Tensor:
    loss_T = logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32)
    call("cross_entropy", logits_TV.dtype, logits_TV, labels_T, loss_T, *logits_TV.shape, scale)
    return loss_T


rms_norm = define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _rms_norm, _fake_rms_norm)
rms_norm_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, bool needs_weight) -> (Tensor, Tensor)",
    _rms_norm_backward,
    _fake_rms_norm_backward,
)
swiglu = define("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, lambda gate, up: torch.empty_like(gate))
swiglu_backward = define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _swiglu_backward,
    lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
)
swiglu_backward_ = define(
    "swiglu_backward_(Tensor grad, Tensor(a!) gate, Tensor(b!) up) -> ()",
    _swiglu_backward_,
    lambda grad, gate, up: None,
)
cross_entropy_ = define(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, float scale) -> Tensor",
    _cross_entropy_,
    lambda logits, labels, scale: logits.new_empty(logits.shape[0], dtype=torch.float32),
)


class FusedRMSNorm(Twin):
    """w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467) in one pass each way.

    Attributes:
        weight: (hidden_size,); the parameter of the norm that stood here.
        variance_epsilon: eps.
    """

    def __init__(self, weight: nn.Parameter, eps: float, original: nn.Module | None = None) -> None:
        super().__init__(original)
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize the last dimension; where input and weight differ in dtype, in torch's own operations."""
        if can_compute(hidden_states, self.weight):
            output: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
            return output
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * scale).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Describe the layer in print(model)."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1]).contiguous()
        y_TD, scale_T = rms_norm(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, scale_T)
        return torch.ops.aten._unsafe_view(y_TD, x.shape)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, scale_T = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_TD = grad.reshape(x_TD.shape).contiguous()
        dx_TD, dw_D = rms_norm_backward(grad_TD, x_TD, weight_D, scale_T, ctx.needs_input_grad[1])
        weight_grad = dw_D.to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return (dx_TD.view(grad.shape) if ctx.needs_input_grad[0] else None), weight_grad, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202); keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return the product; both operands are contiguous and of one shape and dtype."""
        ctx.save_for_backward(gate, up)
        product: Tensor = swiglu(gate, up)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return both gradients."""
        gate, up = ctx.saved_tensors
        gate_grad, up_grad = swiglu_backward(grad_outputs[0].contiguous(), gate, up)
        return gate_grad, up_grad
