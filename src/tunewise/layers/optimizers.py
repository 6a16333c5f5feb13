"""Optimizers that torch has not got: Lion, and AdamW with 8-bit states whose saved state is flat.

Everything here keeps plain tensors and numbers in `state_dict()`, so that a checkpoint can be written as
safetensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunewise.errors import MissingBackend

_NESTED_STATE = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes hides its quantized states from FSDP in `state_dict()`."""


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum: theta -= lr * (sign(b1 m + (1 - b1) g) + wd theta); m = b2 m + (1 - b2) g.

    One state a parameter, in the parameter's dtype.

    References:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2. It
        advises a learning rate 3 to 10 times smaller than AdamW's and a weight decay larger by the same
        factor.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum: Tensor = state["exp_avg"]
                direction = momentum.mul(beta1).add_(parameter.grad, alpha=1 - beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.mul_(beta2).add_(parameter.grad, alpha=1 - beta2)
        return loss


def adamw_8bit(groups: Any, betas: tuple[float, float], eps: float, *, is_paged: bool = False) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW with block-wise 8-bit states, on CUDA or CPU.

    Both moments are kept as one byte a number with one fp32 scale for 256 of them (2.03 bytes a parameter
    instead of 8); a tensor of fewer than 4096 numbers keeps fp32 moments. Paged states live in memory that
    CUDA moves to the host when the device is full.

    References:
        Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861; paging: QLoRA,
        arXiv 2305.14314, section 3.

    Raises:
        MissingBackend: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW
    except ImportError:
        raise MissingBackend("bitsandbytes", "an 8-bit optimizer", "quantize") from None

    class FlatStateAdamW(AdamW):
        """bitsandbytes' optimizer with tensors directly in each parameter's state."""

        def state_dict(self) -> dict[str, Any]:
            """Return the state with bitsandbytes' nested dictionary dissolved."""
            saved: dict[str, Any] = super().state_dict()
            for entries in saved["state"].values():
                entries.update(entries.pop(_NESTED_STATE, {}))
            return saved

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            """Load a state and put paged moments back into paged memory."""
            super().load_state_dict(state_dict, move_to_device)
            if not self.is_paged:
                return
            for parameter, entries in self.state.items():
                for name in ("state1", "state2"):
                    loaded = entries[name]
                    entries[name] = self.get_state_buffer(parameter, dtype=loaded.dtype)
                    entries[name].copy_(loaded)

    return FlatStateAdamW(groups, betas=betas, eps=eps, weight_decay=0.0, optim_bits=8, is_paged=is_paged)
