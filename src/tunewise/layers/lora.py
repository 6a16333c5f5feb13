"""The LoRA layer: a frozen linear layer of any kind plus a trained product of two thin matrices.

    y = base(x) + scale * (x A^T) B^T        Hu et al. 2021 (arXiv 2106.09685), equation 3

The fast path computes this in one autograd function that keeps nothing but the input. Composed from torch
operations the same layer would keep x A^T as well, add two full-sized temporaries in the backward pass, and
under autocast a copy of the frozen weight.

Shape suffixes: T tokens (all leading dimensions flattened), I in_features, O out_features, R rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunewise.errors import InputError
from tunewise.layers.linear import (
    PackedLinear,
    add_input_gradient,
    any_tensor,
    has_values,
    is_transposed,
    linear_shape,
    weight_of,
    without_view,
)

LoraInit = Literal["kaiming", "gaussian", "pissa"]


class Factor(nn.Module):
    """One of the two thin matrices; a module, so that its parameter is named "lora_A.weight" as in PEFT."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoRALinear(nn.Module):
    """A frozen `base_layer` with a trained low-rank update.

    Attributes:
        base_layer: nn.Linear, Conv1D, a packed layer or a layer of bitsandbytes.
        lora_A: factor of shape (rank, in_features).
        lora_B: factor of shape (out_features, rank).
        scale: what the update is multiplied with: alpha / rank, or alpha / sqrt(rank) in rsLoRA.
        dropout: probability with which an input of the update is zeroed in training.
        in_place: whether the update is added into the base layer's output, which spares a copy of it; off
            where that output is kept for recomputation (selective checkpointing).
        is_off: whether the layer computes what its base layer computed before it was adapted, see `adapters_off`.
        initial_a, initial_b: the factors that PiSSA took out of the base weight, else None.
    """

    initial_a: Tensor | None
    initial_b: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap `base_layer`; A and B are zero until `initialize` is called."""
        super().__init__()
        self.in_features, self.out_features = linear_shape(base_layer)
        self.base_layer = base_layer
        like = any_tensor(base_layer)
        self.lora_A = Factor(like.new_zeros((rank, self.in_features), dtype=dtype))
        self.lora_B = Factor(like.new_zeros((self.out_features, rank), dtype=dtype))
        self.scale = scale
        self.dropout = dropout
        self.in_place = True
        self.is_off = False
        self.register_buffer("initial_a", None)
        self.register_buffer("initial_b", None)

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.lora_A.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base layer's stored weight: some models ask their layers for its dtype or device."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if self.is_off:
            return self._unadapted(input)
        drops = self.training and self.dropout > 0.0
        if drops or any(parameter.requires_grad for parameter in self.base_layer.parameters()):
            return lora_linear_reference(
                input,
                self.base_layer,
                self.lora_A.weight,
                self.lora_B.weight,
                self.scale,
                self.dropout if drops else 0.0,
            )
        return lora_linear(
            input, self.base_layer, self.lora_A.weight, self.lora_B.weight, self.scale, in_place=self.in_place
        )

    def _unadapted(self, input: Tensor) -> Tensor:
        """Compute the original base layer; PiSSA has taken a part of its weight out, which is put back here."""
        if self.initial_a is None or self.initial_b is None:
            output: Tensor = self.base_layer(input)
            return output
        return lora_linear_reference(input, self.base_layer, self.initial_a, self.initial_b, self.scale)

    @torch.no_grad()
    def initialize(self, init: LoraInit, generator: torch.Generator | None = None) -> None:
        """Give A and B their first values, drawn on the CPU so that they are the same on every device.

        Args:
            init: "kaiming" (loralib and PEFT: A uniform in +-1/sqrt(in_features), B zero), "gaussian" (PEFT:
                A normal with deviation 1/rank, B zero) or "pissa" (Meng et al. 2024, arXiv 2404.02948,
                equations 2 to 4: A and B hold the largest singular values, the base weight keeps the rest).
            generator: the CPU generator to draw from.

        Raises:
            InputError: "pissa" on a packed base layer or with a rank above the weight's.
        """
        if init == "pissa":
            self._initialize_pissa()
            return
        weight_RI = self.lora_A.weight
        if not has_values(weight_RI):
            return
        drawn_RI = torch.empty(weight_RI.shape, dtype=torch.float32)
        if init == "kaiming":
            nn.init.kaiming_uniform_(drawn_RI, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(drawn_RI, std=1.0 / self.rank, generator=generator)
        weight_RI.copy_(drawn_RI)
        self.lora_B.weight.zero_()

    def _initialize_pissa(self) -> None:
        if isinstance(self.base_layer, PackedLinear) or not self.weight.is_floating_point():
            raise InputError("init 'pissa' changes the base weight, but this one is quantized; use 'kaiming'.")
        if self.rank > min(self.in_features, self.out_features):
            raise InputError(
                f"init 'pissa' needs a rank of at most {min(self.in_features, self.out_features)} for a "
                f"layer of {self.in_features} x {self.out_features}, but the rank is {self.rank}."
            )
        self.initial_a = torch.zeros_like(self.lora_A.weight, requires_grad=False)
        self.initial_b = torch.zeros_like(self.lora_B.weight, requires_grad=False)
        if not has_values(self.weight):
            return
        weight_OI = weight_of(self.base_layer, torch.float32)
        left_OK, singular_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
        root_R = (singular_K[: self.rank] / self.scale).sqrt()
        self.lora_A.weight.copy_(root_R[:, None] * right_KI[: self.rank])
        self.lora_B.weight.copy_(left_OK[:, : self.rank] * root_R)
        self.initial_a.copy_(self.lora_A.weight)
        self.initial_b.copy_(self.lora_B.weight)
        rest_OI = weight_OI - self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float()
        self.weight.copy_(rest_OI.T if is_transposed(self.base_layer) else rest_OI)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the update of the *original* base weight, whatever the initialization did.

        PiSSA trains W + dW = W_rest + s B A with W = W_rest + s B0 A0, so dW = s (B A - B0 A0), which is a
        LoRA of twice the rank with the factors [A; A0] and [B, -B0] (PEFT converts in the same way).
        """
        a_RI, b_OR = self.lora_A.weight.detach(), self.lora_B.weight.detach()
        if self.initial_a is None or self.initial_b is None:
            return a_RI, b_OR
        return torch.cat([a_RI, self.initial_a]), torch.cat([b_OR, -self.initial_b], dim=1)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return W + scale * B A in fp32 (fp64 for an fp64 base), shape (out_features, in_features)."""
        stored = any_tensor(self.base_layer).dtype
        dtype = torch.float64 if stored == torch.float64 else torch.float32
        weight_OI = weight_of(self.base_layer, dtype)
        return torch.addmm(weight_OI, self.lora_B.weight.to(dtype), self.lora_A.weight.to(dtype), alpha=self.scale)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a new base layer with the update in its weight, in `dtype` (None: as stored, packed: fp32).

        A packed base comes back dense: its 4 or 8 bits could not hold the update.
        """
        if isinstance(self.base_layer, PackedLinear):
            merged = self.base_layer.to_dense(dtype or torch.float32)
        else:
            merged = copy.deepcopy(self.base_layer)
            merged = merged if dtype is None else merged.to(dtype)
        weight = merged.weight
        assert isinstance(weight, Tensor)
        weight_OI = self.merged_weight()
        weight.copy_(weight_OI.T if is_transposed(merged) else weight_OI)
        return merged

    def extra_repr(self) -> str:
        """Describe the update in print(model)."""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's LoRA layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let `model` be its own base: within, no LoRA layer adds its update. No second model is in memory.

    What an adapter trains besides (`modules_to_save`, norms) is not undone; see `adapted_only`.
    """
    layers = [layer for layer in lora_layers(model).values() if not layer.is_off]
    for layer in layers:
        layer.is_off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_off = False


def adapted_only(model: nn.Module) -> bool:
    """Whether LoRA factors are all that is trained, so that `adapters_off` gives back the base exactly."""
    layers = lora_layers(model).values()
    factors = {id(factor.weight) for layer in layers for factor in (layer.lora_A, layer.lora_B)}
    is_all = bool(factors) and all(id(p) in factors for p in model.parameters() if p.requires_grad)
    return is_all and all(is_plain(layer) for layer in layers)


def is_plain(layer: LoRALinear) -> bool:
    """Whether the layer computes W x + s B A x with all of B and A, which relatives such as DoRA and DyLoRA do not."""
    return type(layer).forward is LoRALinear.forward


def merge_lora(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every LoRA layer of the model by its merged base layer; see `LoRALinear.merge`."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merge(dtype))


def lora_linear_reference(
    input: Tensor,
    base_layer: nn.Module,
    lora_A_RI: Tensor,
    lora_B_OR: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute base(x) + scale * (x A^T) B^T from torch's own differentiable operations.

    It is the truth that the fast path is tested against, and the path taken where the fast one does not
    apply: with dropout, and when the base layer is trained as well.
    """
    output: Tensor = base_layer(input)
    dropped = functional.dropout(input, dropout) if dropout > 0.0 else input
    dropped = dropped.to(output.dtype)
    low = functional.linear(dropped, lora_A_RI.to(output.dtype))
    return output + scale * functional.linear(low, lora_B_OR.to(output.dtype))


def lora_linear(
    input: Tensor, base_layer: nn.Module, lora_A_RI: Tensor, lora_B_OR: Tensor, scale: float, *, in_place: bool
) -> Tensor:
    """Compute what `lora_linear_reference` does by the fast path; the base layer must be frozen.

    Args:
        input: (..., in_features).
        base_layer: a linear layer of any kind.
        lora_A_RI, lora_B_OR: the factors.
        scale: of the update.
        in_place: whether the update is added into the base layer's output.
    """
    output: Tensor = _LoRALinearFunction.apply(input, lora_A_RI, lora_B_OR, base_layer, scale, in_place)
    return output


class _LoRALinearFunction(torch.autograd.Function):
    """The fast path, in the dtype of the base layer's output, which is autocast's where that is on."""

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
        ctx.save_for_backward(input, lora_A_RI, lora_B_OR)
        ctx.base_layer, ctx.scale = base_layer, scale
        output: Tensor = base_layer(input).contiguous()
        output = output if in_place else output.clone()
        input_TI = input.reshape(-1, input.shape[-1]).to(output.dtype)
        low_TR = input_TI @ lora_A_RI.to(output.dtype).T
        output.view(-1, output.shape[-1]).addmm_(low_TR, lora_B_OR.to(output.dtype).T, alpha=scale)
        return without_view(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, lora_A_RI, lora_B_OR = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_TO = grad.reshape(-1, grad.shape[-1])
        a_RI, b_OR = lora_A_RI.to(grad.dtype), lora_B_OR.to(grad.dtype)
        grad_low_TR = grad_TO @ b_OR
        grad_input = grad_A_RI = grad_B_OR = None
        if ctx.needs_input_grad[0]:
            grad_TI = add_input_gradient(ctx.base_layer, grad_TO)
            grad_TI.addmm_(grad_low_TR, a_RI, alpha=ctx.scale)
            grad_input = grad_TI.view(input.shape).to(input.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            input_TI = input.reshape(-1, input.shape[-1]).to(grad.dtype)
            if ctx.needs_input_grad[1]:
                grad_A_RI = (grad_low_TR.T @ input_TI).to(lora_A_RI.dtype).mul_(ctx.scale)
            if ctx.needs_input_grad[2]:
                grad_B_OR = (grad_TO.T @ (input_TI @ a_RI.T)).to(lora_B_OR.dtype).mul_(ctx.scale)
        return grad_input, grad_A_RI, grad_B_OR, None, None, None
