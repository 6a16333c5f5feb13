"""APOLLO: Adam's moments live in a random low-rank image of the gradient and only say how much to scale it.

    R = P G                       P random, r rows, variance 1 / r, drawn anew every `update_every` steps from a seed
    M, V = Adam's moments of R    r numbers a column instead of two for each weight
    s_j = |R~_j| / |R_j|          R~ = M / (sqrt(V) + eps); a column ("channel") each, or one s for the whole tensor
    W -= lr alpha s G             the gradient itself, full rank; its norm may grow by at most 1 % a step

Chosen over GaLore (Zhao et al. 2024, arXiv 2403.03507), which projects onto singular vectors: no decomposition of every
matrix every 200 steps, updates of full rank, and it works down to rank 1 (APOLLO-Mini).

References:
    Zhu et al. 2024, "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270, algorithm 1; rank 1, one
    scale a tensor and alpha = sqrt(128) make APOLLO-Mini; the limiter: equation 4, gamma = 1.01.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunewise.layers.optimizers import TensorwiseOptimizer

GROWTH = 1.01
"""The factor by which an update's norm may grow from one step to the next."""

_PRIME = 1_000_003


class Apollo(TensorwiseOptimizer):
    """See the module's docstring. Vectors, and matrices no larger than the rank on a side, get plain AdamW."""

    def __init__(
        self,
        params: Any,
        *,
        rank: int,
        is_channelwise: bool,
        alpha: float,
        update_every: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._rank, self._is_channelwise, self._alpha = rank, is_channelwise, alpha
        self._update_every, self._seed = update_every, seed
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._numbers = {parameter: number for number, parameter in enumerate(parameters)}

    def update_tensor(
        self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update one parameter."""
        gradient = gradient.float()
        is_projected = gradient.ndim == 2 and min(gradient.shape) > self._rank
        state["step"] = state.get("step", 0) + 1
        if is_projected:
            image = self._project(gradient, parameter, state["step"])
            update = self._scaled(gradient, image, _adam(image, state, group), state)
        else:
            update = _adam(gradient, state, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.mul_(-group["lr"]).to(parameter.dtype))

    def _project(self, gradient: Tensor, parameter: nn.Parameter, step: int) -> Tensor:
        """Map the smaller side of the gradient to the rank; the larger one is that of the channels."""
        rows, columns = gradient.shape
        turn = (step - 1) // self._update_every
        generator = torch.Generator(device=gradient.device)
        generator.manual_seed(((self._seed * _PRIME + self._numbers[parameter]) * _PRIME + turn) % 2**63)
        shape = (self._rank, rows) if rows <= columns else (columns, self._rank)
        projection = torch.randn(shape, generator=generator, device=gradient.device).div_(self._rank**0.5)
        return projection @ gradient if rows <= columns else gradient @ projection

    def _scaled(self, gradient: Tensor, image: Tensor, adapted: Tensor, state: dict[str, Any]) -> Tensor:
        """Scale the gradient as Adam scaled its image, and let its norm grow slowly."""
        tiny = torch.finfo(torch.float32).tiny
        if self._is_channelwise:
            rank_dim = 0 if gradient.shape[0] <= gradient.shape[1] else 1
            scale = adapted.norm(dim=rank_dim, keepdim=True) / image.norm(dim=rank_dim, keepdim=True).clamp_min(tiny)
        else:
            scale = adapted.norm() / image.norm().clamp_min(tiny)
        update = gradient * scale
        norm = update.norm()
        if "norm" in state:
            factor = torch.where(state["norm"] > 0, GROWTH * state["norm"] / norm.clamp_min(tiny), 1.0).clamp_(max=1.0)
            update, norm = update.mul_(factor), norm * factor
        state["norm"] = norm
        scaled: Tensor = update.mul_(self._alpha)
        return scaled


def _adam(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Update the moments of `gradient` and return Adam's direction."""
    beta1, beta2 = group["betas"]
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    first = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
    direction: Tensor = (first / root).div_(1 - beta1 ** state["step"])
    return direction
