"""AdaLoRA's part in the step: its budget of ranks after every update, and its penalty in the loss.

Zhang et al. 2023, "AdaLoRA" (arXiv 2303.10512). The layers P diag(lambda) Q and the allocation by importance are
peft's; the library leaves calling `update_and_allocate` to the training loop, and adds the penalty only to a loss
that the model computes itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunewise.errors import InputError
from tunewise.layers.linear import has_values

UNKNOWN_STEPS = 1000
"""Steps between warm-up and the last phase where nobody knows how many there will be: in a measurement."""

_SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""The allocator's tensors for each parameter: importance, its mean and its uncertainty."""


class RankBudget:
    """The budget of ranks of a peft model of kind ADALORA."""

    def __init__(self, model: Any, total_step: int | None, checks_finite: bool) -> None:
        """Prepare a budget.

        Args:
            model: the peft model.
            total_step: the user's, else None: the length of the training.
            checks_finite: whether gradients may be infinite (fp16), which must not get into the importance.
        """
        self._tuner = model.base_model
        self._config = self._tuner.peft_config[self._tuner.trainable_adapter_name]
        self._parameters = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name]
        self._total_step, self._checks_finite, self._step = total_step, checks_finite, 0

    def begin_step(self, step: int, num_steps: int | None) -> None:
        """Remember the number of the step, and how many there will be.

        Raises:
            InputError: warm-up and last phase leave no step between them.
        """
        config = self._config
        known = self._total_step or num_steps
        if known is not None and config.tinit >= known - config.tfinal:
            raise InputError(
                f"peft: ADALORA with tinit {config.tinit} and tfinal {config.tfinal} has no step left of {known} in "
                "which to reduce ranks; lower them, or train longer."
            )
        config.total_step = known or config.tinit + config.tfinal + UNKNOWN_STEPS
        self._step = step

    def after_update(self) -> None:
        """Take the gradients into the importance of ranks, and set the least important ones to zero."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._checks_finite and not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return  # fp16's scaler has skipped this step
        step = self._step if has_values(self._parameters[0]) else 0  # a threshold among fake numbers says nothing
        self._tuner.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        """Return the importance of every parameter, and which ranks are left where that is decided."""
        allocator = self._tuner.rankallocator
        found = {f"{kind}/{name}": value for kind in _SUMS for name, value in getattr(allocator, kind).items()}
        for name, kept in (self._config.rank_pattern or {}).items():
            found[f"rank_pattern/{name}"] = torch.tensor(kept, dtype=torch.bool)
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` returned; nothing: as in the beginning."""
        allocator = self._tuner.rankallocator
        allocator.reset_ipt()
        pattern: dict[str, list[bool]] = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "rank_pattern":
                pattern[name] = value.tolist()
            else:
                getattr(allocator, kind)[name] = value.to(self._parameters[0].device)
        self._config.rank_pattern = pattern or None

    def penalty(self) -> Tensor:
        """Return the weighted distance of P and Q from orthogonality: the mean of |P^T P - 1| (equation 4)."""
        factors = [
            (name, parameter)
            for name, parameter in self._tuner.model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]
        return float(self._config.orth_reg_weight) * orthogonality([p if ".lora_A." in n else p.T for n, p in factors])


def orthogonality(factors: list[nn.Parameter | Tensor]) -> Tensor:
    """Return the mean over `factors`, each (R, N), of the Frobenius norm of F F^T - 1, in fp32."""
    norms = []
    for factor_RN in factors:
        exact_RN = factor_RN.float()
        norms.append(torch.linalg.norm(exact_RN @ exact_RN.T - torch.eye(len(factor_RN), device=factor_RN.device)))
    return torch.stack(norms).mean()
