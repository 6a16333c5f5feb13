"""FP8-LM's optimizer: AdamW that stores master weights, moments and gradients in 16 and 8 bits.

    gradient 1 byte (FP8), first moment 1 (FP8), second moment 2 (FP16), master weight 2 (FP16 with a scale): 6 bytes
    a parameter against 4 + 4 + 4 + 4 = 16; the weights with which is computed come on top in both.

Arithmetic is fp32: what is stored is read, updated and stored again, one tensor after another.

Gradients: what a micro-batch adds is put into 8 bits as soon as autograd has it. All micro-batches of a step share the
scale that the first one has set, so their sum can overflow, exactly as FP8-LM's sum over machines can. Automatic
scaling multiplies that scale by mu: when more than `threshold` of all numbers overflowed, mu is halved for the next
step, else it grows, to the double within `window` steps.

References:
    Peng et al. 2023, "FP8-LM: Training FP8 Large Language Models" (arXiv 2310.18313), sections 2.1 (automatic scaling,
    threshold 0.001 %, doubling in 1000 steps) and 2.2 (precision decoupling, the 6 bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.layers.optimizers import TensorwiseOptimizer, keep
from tunewise.layers.scaled_numbers import DTYPES, NumberFormat, decode, encode, is_scaled, scale_for

Stored = tuple[Tensor, Tensor | None]


class StoredGradients:
    """Gradients in a format of their own: `parameter.grad` is there only while autograd accumulates into it."""

    def __init__(self, number_format: NumberFormat) -> None:
        self.number_format = number_format
        self._stored: dict[Tensor, Stored] = {}
        self._overflows: list[Tensor] = []
        self._seen = 0

    def take(self, parameter: Tensor, multiplier: float) -> None:
        """Add `parameter.grad` to what is stored and free it.

        Args:
            parameter: has a gradient.
            multiplier: mu of automatic scaling; a scaled format only.
        """
        assert parameter.grad is not None
        total = parameter.grad.float()
        parameter.grad = None
        known = self._stored.get(parameter)
        if not is_scaled(self.number_format):
            scale = None
        elif known is None:
            scale = scale_for(total, self.number_format) * multiplier
        else:
            scale = known[1]
        if known is not None:
            total = decode(*known).add_(total)
        if scale is not None:
            largest = torch.finfo(DTYPES[self.number_format]).max
            self._overflows.append((total.abs() > largest / scale).sum())
            self._seen += total.numel()
        self._stored[parameter] = encode(total, self.number_format, scale)

    def of(self, parameter: Tensor) -> Tensor | None:
        """Return a parameter's gradient as a fresh fp32 tensor, None where it has none."""
        known = self._stored.get(parameter)
        return None if known is None else decode(*known)

    def tensors_of(self, parameter: Tensor) -> list[Tensor]:
        """Return what is stored of one parameter's gradient."""
        return [tensor for tensor in self._stored.get(parameter, ()) if tensor is not None]

    def norm(self) -> Tensor:
        """Return the norm of all gradients together."""
        norms = [torch.linalg.vector_norm(decode(*stored)) for stored in self._stored.values()]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def multiply(self, factor: Tensor) -> None:
        """Multiply all gradients: of scaled ones only the scale changes."""
        for parameter, (values, scale) in self._stored.items():
            self._stored[parameter] = (values * factor, None) if scale is None else (values, scale / factor)

    def overflow_ratio(self) -> float:
        """Return which share of the numbers did not fit, over everything that was taken since `clear`."""
        return float(torch.stack(self._overflows).sum()) / self._seen if self._seen else 0.0

    def tensors(self) -> list[Tensor]:
        """Return what is stored."""
        return [tensor for parameter in self._stored for tensor in self.tensors_of(parameter)]

    def clear(self) -> None:
        """Forget everything."""
        self._stored.clear()
        self._overflows.clear()
        self._seen = 0


class FP8LMAdamW(TensorwiseOptimizer):
    """AdamW whose parts are stored in formats of choice; see the module's docstring.

    A parameter's state is `step`, `exp_avg`, `exp_avg_sq` and `master`, the last three each with `_scale` where their
    format has one. No master is kept where the parameter itself is stored in the master's format. mu is in the
    groups (`gradient_multiplier`), so it is saved with them.

    Attributes:
        stored_gradients: where gradients are kept; None: they stay autograd's.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gradient: NumberFormat = "fp8",
        first_moment: NumberFormat = "fp8",
        second_moment: NumberFormat = "fp16",
        master: NumberFormat = "fp16",
        threshold: float = 1e-5,
        window: int = 1000,
    ) -> None:
        """Take the parameters, and let their gradients be stored in `gradient` as soon as autograd has them."""
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "gradient_multiplier": 1.0},
        )
        self._first, self._second, self._master = first_moment, second_moment, master
        self._threshold, self._window = threshold, window
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        stores = any(parameter.dtype != DTYPES[gradient] for parameter in parameters)
        self.stored_gradients = StoredGradients(gradient) if stores else None
        if self.stored_gradients is not None:
            for index, group in enumerate(self.param_groups):
                for parameter in group["params"]:
                    parameter.register_post_accumulate_grad_hook(partial(self.take_gradient, index))

    def take_gradient(self, index: int, parameter: Tensor) -> None:
        """Store the gradient of a parameter of group `index` and free autograd's."""
        assert self.stored_gradients is not None
        self.stored_gradients.take(parameter, self.param_groups[index]["gradient_multiplier"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, stored or plain, and adapt mu."""
        if self.stored_gradients is None:
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = self.stored_gradients.of(parameter)
                gradient = parameter.grad if gradient is None else gradient
                if gradient is not None:
                    self.update_tensor(parameter, gradient, self.state[parameter], group)
        if is_scaled(self.stored_gradients.number_format):
            fits = self.stored_gradients.overflow_ratio() <= self._threshold
            for group in self.param_groups:
                group["gradient_multiplier"] *= 2.0 ** (1.0 / self._window) if fits else 0.5
        return None

    @torch.no_grad()
    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Return the norm of all stored gradients after scaling them down to `max_norm` (None: as they are)."""
        assert self.stored_gradients is not None
        norm = self.stored_gradients.norm()
        if max_norm is not None:
            self.stored_gradients.multiply((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        super().zero_grad(set_to_none)
        if self.stored_gradients is not None:
            self.stored_gradients.clear()

    def update_tensor(
        self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Read, update and store one parameter's moments and master weight."""
        gradient, (beta1, beta2) = gradient.float(), group["betas"]
        keeps_master = parameter.dtype != DTYPES[self._master] or is_scaled(self._master)
        if not state:
            state["step"] = 0
            if keeps_master:
                _put(state, "master", parameter.detach().float(), self._master)
            for name, number_format in (("exp_avg", self._first), ("exp_avg_sq", self._second)):
                _put(state, name, torch.zeros_like(gradient), number_format)
        state["step"] += 1
        first = _read(state, "exp_avg").mul_(beta1).add_(gradient, alpha=1 - beta1)
        second = _read(state, "exp_avg_sq").mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weights = _read(state, "master") if keeps_master else parameter.detach().float()
        root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.addcdiv_(first, root, value=-group["lr"] / (1 - beta1 ** state["step"]))
        _put(state, "exp_avg", first, self._first)
        _put(state, "exp_avg_sq", second, self._second)
        if keeps_master:
            _put(state, "master", weights, self._master)
            weights = _read(state, "master")
        parameter.copy_(weights)


def stored_gradients_of(optimizer: torch.optim.Optimizer) -> StoredGradients | None:
    """Return where the optimizer keeps gradients in a format of its own, None where they are autograd's."""
    return optimizer.stored_gradients if isinstance(optimizer, FP8LMAdamW) else None


def _put(state: dict[str, Any], name: str, values: Tensor, number_format: NumberFormat) -> None:
    stored, scale = encode(values, number_format)
    keep(state, name, stored)
    if scale is not None:
        keep(state, name + "_scale", scale)


def _read(state: dict[str, Any], name: str) -> Tensor:
    return decode(state[name], state.get(name + "_scale"))
