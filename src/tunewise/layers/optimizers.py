"""Optimizers that torch has not got: Lion, RMSProp with Nesterov's momentum, and AdamW with flat 8-bit states.

Everything here keeps plain tensors and numbers in `state_dict()`, so that a checkpoint can be written as
safetensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.layers.bitsandbytes_library import import_bitsandbytes

_NESTED_STATE = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes hides its quantized states from FSDP in `state_dict()`."""


class TensorwiseOptimizer(torch.optim.Optimizer):
    """Updates one tensor after another by `update_tensor`, and loads its state in the dtypes in which it was saved.

    torch casts a loaded state to the parameter's dtype, which would undo 4-, 8- and 16-bit states.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update_tensor(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def update_tensor(
        self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update one parameter; `state` is empty the first time."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it is."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, entries in state_dict["state"].items():
            parameter = parameters[int(index)]
            self.state[parameter] = {
                key: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in entries.items()
            }


class TensorwiseAdam(TensorwiseOptimizer):
    """The options that Adam's relatives share, with torch's defaults."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})


def keep(state: dict[str, Any], name: str, value: Tensor) -> None:
    """Put a tensor into a parameter's state, into the memory of the one that it replaces."""
    if name in state:
        state[name].copy_(value)
    else:
        state[name] = value


class Lion(TensorwiseOptimizer):
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

    def update_tensor(
        self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update one parameter."""
        beta1, beta2 = group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        momentum: Tensor = state["exp_avg"]
        direction = momentum.mul(beta1).add_(gradient, alpha=1 - beta1).sign_()
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        momentum.mul_(beta2).add_(gradient, alpha=1 - beta2)


class NesterovRMSprop(TensorwiseOptimizer):
    """RMSProp with Nesterov's momentum, which torch has not got.

        r = rho r + (1 - rho) g^2;  v' = alpha v - lr g / (sqrt(r) + eps);  theta += v'

    The gradient is taken at the interim point theta + alpha v, and that is the point which the parameter stores:
    theta + alpha v  becomes  theta' + alpha v'  by adding (1 + alpha) v' - alpha v. Weight decay is added to the
    gradient, as in torch's RMSprop. Two states a parameter, in the parameter's dtype.

    References:
        Goodfellow, Bengio, Courville 2016, "Deep Learning", algorithm 8.6 (which has no eps).
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, decay: float = 0.99, momentum: float = 0.9, eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": 0.0})

    def update_tensor(
        self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Update one parameter."""
        if not state:
            state["square_avg"] = torch.zeros_like(parameter)
            state["velocity"] = torch.zeros_like(parameter)
        squares, velocity, momentum = state["square_avg"], state["velocity"], group["momentum"]
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        squares.mul_(group["decay"]).addcmul_(gradient, gradient, value=1 - group["decay"])
        parameter.sub_(velocity, alpha=momentum)
        velocity.mul_(momentum).addcdiv_(gradient, squares.sqrt().add_(group["eps"]), value=-group["lr"])
        parameter.add_(velocity, alpha=1 + momentum)


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
    library = import_bitsandbytes("an 8-bit optimizer")

    class FlatStateAdamW(library.optim.AdamW):  # type: ignore[name-defined]
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
