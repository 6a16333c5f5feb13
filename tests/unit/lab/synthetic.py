"""Two laboratories with a known answer, for studies that ask for the critical batch size.

`SyntheticLab`      a formula: loss after so many tokens at a batch, learning rate and beta2; microseconds a run
`LinearRegression`  a real one: torch gradients of noisy linear regression, whose noise scale has a closed form

Both have the same question as their last method: `train(batch_tokens, learning_rate, beta2, tokens, seed)` gives
(final loss, learning curve, seconds).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunewise.lab.outcome import Point

Trained = tuple[float, tuple[Point, ...], float]
"""Final loss (nats per token), loss by tokens learnt, seconds of the steps."""


@dataclass(frozen=True)
class SyntheticLab:
    """Trainings that obey the laws of batch size exactly, but for seed noise.

        loss = floor + amplitude * (tokens / (1 + batch / critical_batch)) ^ -exponent      McCandlish et al. 2018
             + curvature * ln(learning_rate / best(batch))^2                               a bowl in the logarithm
             + curvature / 10 * ln(half_life / best_half_life)^2                           beta2, Marek et al. 2025
             + seed_noise * normal(seed, and what is trained)
        best(batch) = learning_rate_limit / sqrt(1 + critical_batch / batch)               sqrt rule that saturates

    A learning rate of more than `diverges_at` times the best ends at the loss of the untrained model. Before the
    decay to zero a run lies above the line that its end lies on (`undecayed` nats at mid-run), so that only ends of
    runs may be compared. A step takes t0 + t1 * batch seconds.

    With the defaults 1M tokens end at 2.1 nats; a batch of twice the critical one ends 0.24 nats above a tiny one.
    """

    critical_batch: float = 4096.0
    learning_rate_limit: float = 2e-3
    half_life_tokens: float = 50_000.0
    floor: float = 1.5
    amplitude: float = 38.0
    exponent: float = 0.3
    curvature: float = 0.02
    seed_noise: float = 0.005
    start: float = 4.0
    undecayed: float = 0.08
    diverges_at: float = 12.0
    t0_seconds: float = 0.05
    t1_seconds: float = 2e-5

    def best_learning_rate(self, batch_tokens: float) -> float:
        """The learning rate with the lowest loss at this batch."""
        return self.learning_rate_limit / math.sqrt(1 + self.critical_batch / batch_tokens)

    def best_beta2(self, batch_tokens: float) -> float:
        """Adam's beta2 with the lowest loss: its half-life in tokens is the same for every batch."""
        return float(0.5 ** (batch_tokens / self.half_life_tokens))

    def expected_loss(self, batch_tokens: float, learning_rate: float, beta2: float | None, tokens: float) -> float:
        """The loss of the end of a run without seed noise; `beta2` None is the best one."""
        off = math.log(learning_rate / self.best_learning_rate(batch_tokens))
        if off > math.log(self.diverges_at):
            return self.start
        loss = self._power_law(tokens / (1 + batch_tokens / self.critical_batch)) + self.curvature * off**2
        if beta2 is not None:
            half_life = batch_tokens * math.log(0.5) / math.log(beta2)
            loss += self.curvature / 10 * math.log(half_life / self.half_life_tokens) ** 2
        return min(self.start, loss)

    def train(self, batch_tokens: int, learning_rate: float, beta2: float | None, tokens: int, seed: int) -> Trained:
        """One run: tokens are rounded up to whole steps; the curve has ten points."""
        steps = math.ceil(tokens / batch_tokens)
        chance = random.Random(f"{batch_tokens} {learning_rate:.6g} {beta2} {tokens} {seed}")
        end = self.expected_loss(batch_tokens, learning_rate, beta2, tokens) + self.seed_noise * chance.gauss(0, 1)
        curve = []
        for tenth in range(1, 10):
            share = tenth / 10
            above = self.undecayed * 4 * share * (1 - share)
            expected = self.expected_loss(batch_tokens, learning_rate, beta2, tokens * share) + above
            curve.append((share, expected + self.seed_noise * chance.gauss(0, 1)))
        points = tuple(
            Point(supervised_tokens=round(tokens * share), loss=loss) for share, loss in [*curve, (1.0, end)]
        )
        return end, points, steps * (self.t0_seconds + self.t1_seconds * batch_tokens)

    def _power_law(self, tokens: float) -> float:
        return self.floor + self.amplitude * math.pow(max(tokens, 1.0), -self.exponent)


@dataclass(frozen=True)
class LinearRegression:
    """y = 0 . x + noise, learnt by w from independent x ~ N(0, 1), with loss 1/2 (w . x - y)^2 for each token.

    The gradient of a token is (w . x - y) x: its mean is w (the Hessian is 1), and the trace of its covariance
    (dimension + 1) |w|^2 + dimension * noise^2 (Isserlis). The Hessian being 1, the noise scale is also the critical
    batch of a step: the best step lowers |w|^2 by the share 1 / (1 + noise_scale / batch).

    Tokens of one document resemble each other: inputs correlate with `input_likeness`, noises with `noise_likeness`.
    """

    dimension: int = 32
    noise: float = 2.0
    input_likeness: float = 0.0
    noise_likeness: float = 0.0

    def weights(self, norm: float) -> nn.Parameter:
        """Weights of this norm."""
        return nn.Parameter(torch.full((self.dimension,), norm / math.sqrt(self.dimension)))

    def document(self, length: int, random_state: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (length, dimension) and targets (length,) of one document."""

        def alike(likeness: float, *shape: int) -> Tensor:
            shared = torch.randn(1, *shape, generator=random_state)
            own = torch.randn(length, *shape, generator=random_state)
            return math.sqrt(likeness) * shared + math.sqrt(1 - likeness) * own

        return alike(self.input_likeness, self.dimension), self.noise * alike(self.noise_likeness)

    def loss(self, weights: Tensor, documents: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over the tokens of `documents`."""
        inputs_TD = torch.cat([inputs for inputs, _ in documents])
        targets_T = torch.cat([targets for _, targets in documents])
        return 0.5 * (inputs_TD @ weights - targets_T).square().sum()

    def variance(self, weights: Tensor, lengths: Sequence[int] = (1,)) -> float:
        """What N times the trace of the covariance of a batch's mean gradient is, for documents of such lengths."""
        squared, likeness = float(weights.detach().square().sum()), self.input_likeness
        of_token = (self.dimension + 1) * squared + self.dimension * self.noise**2
        of_pair = likeness**2 * (self.dimension + 1) * squared
        of_pair += self.noise_likeness * likeness * self.noise**2 * self.dimension
        return of_token + of_pair * sum(n * (n - 1) for n in lengths) / sum(lengths)

    def noise_scale(self, weights: Tensor, lengths: Sequence[int] = (1,)) -> float:
        """Tokens at which the gradient's noise is as large as the gradient."""
        return self.variance(weights, lengths) / float(weights.detach().square().sum())

    def train(
        self, batch_tokens: int, learning_rate: float, beta2: float | None, tokens: int, seed: int, norm: float = 4.0
    ) -> Trained:
        """Learn from single-token documents: SGD where `beta2` is None, else Adam, both decaying linearly to zero.

        The loss is the expected one of the weights, 1/2 (|w|^2 + noise^2); seconds are those of the steps' number.
        """
        chance, weights = torch.Generator().manual_seed(seed), self.weights(norm)
        optimizer: torch.optim.Optimizer
        if beta2 is None:
            optimizer = torch.optim.SGD([weights], lr=learning_rate)
        else:
            optimizer = torch.optim.Adam([weights], lr=learning_rate, betas=(0.9, beta2))
        steps, curve = math.ceil(tokens / batch_tokens), []
        for step in range(steps):
            inputs_TD = torch.randn(batch_tokens, self.dimension, generator=chance)
            targets_T = self.noise * torch.randn(batch_tokens, generator=chance)
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            optimizer.zero_grad()
            (self.loss(weights, [(inputs_TD, targets_T)]) / batch_tokens).backward()
            optimizer.step()
            if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
                curve.append(Point(supervised_tokens=(step + 1) * batch_tokens, loss=self.expected_loss(weights)))
        return curve[-1].loss, tuple(curve), steps * 1e-3

    def expected_loss(self, weights: Tensor) -> float:
        """The loss of a token that was never seen, in expectation."""
        return 0.5 * (float(weights.detach().square().sum()) + self.noise**2)
