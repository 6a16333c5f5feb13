"""Adam-mini: one second moment for a whole row of a matrix instead of one for each weight.

References:
    Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv 2406.16793, algorithm 1: blocks in
    which the Hessian is dense may share a learning rate. Its blocks are rows of output neurons and of tokens, and a
    head's rows together in query and key; here query and key have a row each too (finer, so never less than its own
    principle asks for). A vector is one block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunewise.layers.optimizers import TensorwiseAdam


class AdamMini(TensorwiseAdam):
    """AdamW with v = mean of g^2 over a row; the first moment stays one fp32 number a parameter."""

    def update_tensor(
        self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update one parameter."""
        gradient, (beta1, beta2) = gradient.float(), group["betas"]
        mean_square = gradient.square().mean(dim=tuple(range(min(1, gradient.ndim - 1), gradient.ndim)), keepdim=True)
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(mean_square)}
        state["step"] += 1
        first = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).add_(mean_square, alpha=1 - beta2)
        root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        update = (first / root).mul_(-group["lr"] / (1 - beta1 ** state["step"]))
        parameter.add_(update.to(parameter.dtype))
