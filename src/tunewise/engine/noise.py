"""The noise of the gradient, measured for free from the micro-batches of a step (McCandlish et al. 2018, 1812.06162).

A global batch of N supervised tokens has the mean gradient G_B; its micro-batch i of n_i tokens has G_i and has added
g_i = n_i / N * G_i to what accumulates. With tokens as independent draws (documents are clusters of them, so this is
the noise of a batch of documents, counted in tokens),

    E |G_i|^2 = |G|^2 + S / n_i        E |G_B|^2 = |G|^2 + S / N

which two equations give |G|^2 and S, the trace of one token's covariance, without bias for any sizes n_i.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tunewise.engine.noise_sums import NoiseSums


class NoiseMeter:
    """Watches the gradients of `parameters` accumulate over the micro-batches of one step.

    It keeps one copy of them: the memory of one more gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self.start()

    def start(self) -> None:
        """Forget the step before; gradients are zero now."""
        self._before: list[Tensor | None] = [None] * len(self._parameters)
        self._parts: list[tuple[int, float]] = []

    @torch.no_grad()
    def after_micro_batch(self, num_supervised: int) -> None:
        """Take what the micro-batch of `num_supervised` tokens has just added to the gradients."""
        squared = 0.0
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            before = self._before[index]
            added = parameter.grad if before is None else parameter.grad - before
            squared += float(added.double().square().sum())
            self._before[index] = parameter.grad.clone()
        if num_supervised:
            self._parts.append((num_supervised, squared))

    def finish(self, num_supervised: int, scale: float = 1.0) -> NoiseSums | None:
        """Return the two estimates of the step; None where it had a single micro-batch.

        Args:
            num_supervised: tokens of the whole step, by which the loss was divided.
            scale: the factor on the loss (fp16).
        """
        if len(self._parts) < 2:
            return None
        total = sum(float(each.double().square().sum()) for each in self._before if each is not None) / scale**2
        squares = [squared / scale**2 * (num_supervised / size) ** 2 for size, squared in self._parts]
        small = sum(squares) / len(squares)
        inverse = sum(1 / size for size, _ in self._parts) / len(self._parts)
        variance = (small - total) / (inverse - 1 / num_supervised)
        return NoiseSums(squared_norm=total - variance / num_supervised, variance=variance)
