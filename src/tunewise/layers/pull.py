"""A pull of what is trained towards where it started, applied just before each update of the optimizer.

    theta <- theta - lr * strength * (theta - theta_0)          parameters
    W = W_0 + s B A:   the same with the gradient of |s B A|^2 / 2, that is s^2 B (A A^T) and s^2 (B^T B) A

With SGD this is the gradient of L2-SP (Li et al. 2018, arXiv 1802.01483, equation 2); with adaptive optimizers it is
decoupled from their scaling, as AdamW's decay is (Loshchilov and Hutter 2017, arXiv 1711.05101). A LoRA layer is pulled
by its product, because that, and not its factors, is how far the weights are from the base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.layers.lora import LoRALinear, lora_layers


class Pull:
    """The pull on everything that `model` trains; takes the present values as the start."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.strength = strength
        self._layer_of: dict[int, LoRALinear] = {}
        for layer in lora_layers(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                self._layer_of[id(factor.weight)] = layer
        self._start_of = {
            id(parameter): parameter.detach().clone()
            for parameter in model.parameters()
            if parameter.requires_grad and id(parameter) not in self._layer_of
        }

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let `optimizer` pull before each of its steps, and return it."""
        optimizer.register_step_pre_hook(self._before_step)
        return optimizer

    @torch.no_grad()
    def distances(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return for each parameter the gradient of half the squared distance from the start."""
        return [self._distance(parameter) for parameter in parameters]

    def _distance(self, parameter: Tensor) -> Tensor:
        layer = self._layer_of.get(id(parameter))
        if layer is None:
            return parameter - self._start_of[id(parameter)]
        a_RI, b_OR = layer.update_factors()  # of twice the rank for PiSSA, whose trained half comes first
        rank, square = layer.rank, layer.scale**2
        if parameter is layer.lora_B.weight:
            return square * (b_OR @ (a_RI @ a_RI[:rank].T))
        return square * ((b_OR[:, :rank].T @ b_OR) @ a_RI)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        found_inf = getattr(optimizer, "found_inf", None)  # where fp16's scaler lets a fused optimizer skip the step
        if found_inf is not None and bool(found_inf):
            return
        pulls: list[tuple[Tensor, Tensor, float]] = []
        for group in optimizer.param_groups:
            learnt = [parameter for parameter in group["params"] if parameter.grad is not None]
            pulls += [(p, d, group["lr"]) for p, d in zip(learnt, self.distances(learnt), strict=True)]
        for parameter, distance, rate in pulls:  # after all distances: A's depends on B and B's on A
            parameter.add_(distance, alpha=-rate * self.strength)


MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def pulled(make: MakeOptimizer, model: nn.Module, strength: float) -> MakeOptimizer:
    """Return `make` with the pull attached to what it makes; the start is the model when the optimizer is made."""

    def make_pulled(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Pull(model, strength).attach(make(groups))

    return make_pulled
