"""The noise of the gradient, from the micro-batches of a step (McCandlish et al. 2018, arXiv 1812.06162, appendix A).

A global batch of N supervised tokens has the mean gradient G_B. Its part i (a micro-batch, or one document) has n_i of
them, the share p_i = n_i / N, and the mean gradient G_i; it adds g_i = p_i G_i to what accumulates: G_B = sum g_i.
Parts are independent draws with mean G, so E |G_B|^2 = |G|^2 + S / N; S / N = sum p_i^2 V_i, where V_i is the trace of
part i's covariance, and

    two batches    the norms of the parts against the norm of the whole:
                   S / N = (sum |g_i|^2 - sum p_i^2 |G_B|^2) / (1 - sum p_i^2)
    per example    the spread of the parts around the whole:
                   S / N = (sum p_i^2 |G_i - G_B|^2 + 2 sum p_i^3 (|G_i|^2 - |G_B|^2)) / (1 + sum p_i^2 - 2 sum p_i^3)
    both           |G|^2 = |G_B|^2 - S / N

The first is the usual (B |G_B|^2 - b |G_b|^2) / (B - b) with the small batch b = sum n_i^2 / N; the second becomes the
sample variance. For parts of equal size they are one number. Neither asks that V_i falls as 1 / n_i: the tokens of a
document resemble each other, so it does not, and weighing |G_i|^2 by n_i (or all alike) would then be biased. S is
therefore the noise of whole documents, counted in tokens, and so is the noise scale S / |G|^2; it says nothing about
batches of cut documents. What both ask is that parts have the same mean: where micro-batches are made of documents of
like length and the gradient depends on the length, they have not, and only single documents are to be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunewise.engine.noise_sums import NoiseSums

SMALL_TENSOR = 4096
"""Tensors up to this many elements are always looked at whole."""


class NoiseMeter:
    """Watches the gradients of `parameters` accumulate over the micro-batches of one step.

    It keeps two fp32 copies of the gradients and needs a third for a moment. Of more than `max_elements` elements it
    looks at every k-th of each large tensor and counts each k times: both sums stay unbiased, because they are sums
    over elements. Gradients that accumulate in bf16 are rounded as they grow; with more than about a hundred
    micro-batches a step that rounding is a few per cent of S.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], max_elements: int = 2**24) -> None:
        self._parameters = list(parameters)
        every = max(1, math.ceil(sum(parameter.numel() for parameter in self._parameters) / max_elements))
        self._strides = [_stride(parameter, every) for parameter in self._parameters]
        self.start()

    def start(self) -> None:
        """Forget the step before; gradients are zero now."""
        self._before: Tensor | None = None
        self._by_size: Tensor | None = None  # sum of n_i g_i
        self._sizes: list[int] = []
        self._squares: list[Tensor] = []  # |g_i|^2, left on the device: reading them would wait for it

    @torch.no_grad()
    def after_micro_batch(self, num_supervised: int) -> None:
        """Take what the micro-batch of `num_supervised` tokens has just added to the gradients."""
        if not num_supervised:
            return
        now = self._accumulated()
        added = now.clone() if self._before is None else self._before.neg_().add_(now)
        self._sizes.append(num_supervised)
        self._squares.append(torch.linalg.vector_norm(added).square())
        if self._by_size is None:
            self._by_size = added.mul_(num_supervised)
        else:
            self._by_size.add_(added, alpha=num_supervised)
        self._before = now

    def finish(self, num_supervised: int, scale: float = 1.0) -> NoiseSums | None:
        """Return the step's two estimates by the form "two batches".

        None where the step had a single micro-batch, left no gradient (updates in backward), or overflowed.

        Args:
            num_supervised: tokens of the whole step, by which its loss was divided.
            scale: the factor on the loss (fp16).

        Raises:
            ValueError: the micro-batches had another number of tokens.
        """
        step = self._step(num_supervised)
        if step is None:
            return None
        shares_2 = float(np.sum(step.shares**2))
        excess = (float(np.sum(step.squares)) - shares_2 * step.whole) / (1 - shares_2)
        return _sums(step.whole, excess, num_supervised, scale)

    def per_example(self, num_supervised: int, scale: float = 1.0) -> NoiseSums | None:
        """Return the step's two estimates by the form "per example": each micro-batch was one document.

        None and errors as for `finish`. Micro-batches of several documents do as well.
        """
        step = self._step(num_supervised)
        if step is None:
            return None
        shares_2, shares_3 = float(np.sum(step.shares**2)), float(np.sum(step.shares**3))
        spread = float(np.sum(step.squares)) - 2 * step.along + shares_2 * step.whole  # sum |g_i - p_i G_B|^2
        longer = float(np.sum(step.shares * step.squares)) - shares_3 * step.whole
        excess = (spread + 2 * longer) / (1 + shares_2 - 2 * shares_3)
        return _sums(step.whole, excess, num_supervised, scale)

    def _step(self, num_supervised: int) -> _Step | None:
        """What was seen of the step; None when there is nothing to compare."""
        if self._sizes and sum(self._sizes) != num_supervised:
            raise ValueError(f"micro-batches of {sum(self._sizes)} supervised tokens in a step of {num_supervised}")
        if len(self._sizes) < 2 or self._before is None or self._by_size is None:
            return None
        return _Step(
            shares=np.array(self._sizes) / num_supervised,
            squares=torch.stack(self._squares).double().cpu().numpy(),
            whole=float(torch.linalg.vector_norm(self._before).square()),
            along=float(torch.dot(self._by_size, self._before)) / num_supervised,
        )

    def _accumulated(self) -> Tensor:
        """The gradients as one new fp32 vector, elements that stand for others multiplied by their number's root."""
        pieces = []
        for parameter, stride in zip(self._parameters, self._strides, strict=True):
            if parameter.grad is None:
                pieces.append(parameter.new_zeros(math.ceil(parameter.numel() / stride), dtype=torch.float32))
                continue
            piece = parameter.grad.flatten()[::stride].float()
            pieces.append(piece if stride == 1 else piece * math.sqrt(parameter.numel() / piece.numel()))
        return torch.cat(pieces)


def _stride(parameter: nn.Parameter, every: int) -> int:
    """The step by which a tensor's elements are taken: at least `every`, without a divisor in common with its rows'
    length, so that all columns are looked at alike."""
    if parameter.numel() <= SMALL_TENSOR or every == 1:
        return 1
    while math.gcd(every, parameter.shape[-1]) > 1:
        every += 1
    return every


@dataclass(frozen=True)
class _Step:
    """Shares p_i and squares |g_i|^2 of the parts, |G_B|^2 of the whole, and sum p_i g_i . G_B."""

    shares: NDArray[np.float64]
    squares: NDArray[np.float64]
    whole: float
    along: float


def _sums(whole: float, excess: float, num_supervised: int, scale: float) -> NoiseSums | None:
    """The estimates from |G_B|^2 and S / N."""
    if not (math.isfinite(whole) and math.isfinite(excess)) or whole == 0.0:
        return None
    return NoiseSums(squared_norm=(whole - excess) / scale**2, variance=excess * num_supervised / scale**2)
