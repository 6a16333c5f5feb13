"""The laboratories of the tests keep what they promise: the studies are judged by them."""

from __future__ import annotations

import math

import pytest
import torch

from tests.unit.lab.synthetic import LinearRegression, SyntheticLab


@pytest.mark.parametrize("batch", [8, 64, 512])
def test_a_step_gains_what_the_noise_scale_says(batch: int) -> None:
    """McCandlish et al. 2018, eq. 2.7: the best step lowers the excess loss by the share 1 / (1 + scale / batch)."""
    problem, chance = LinearRegression(), torch.Generator().manual_seed(0)
    weights = problem.weights(4.0)
    share = 1 / (1 + problem.noise_scale(weights) / batch)
    left = []
    for _ in range(400):
        weights.grad = torch.zeros_like(weights)
        (problem.loss(weights, [problem.document(batch, chance)]) / batch).backward()
        left.append(float((weights.detach() - share * weights.grad).square().sum()) / 16)
    assert 1 - sum(left) / len(left) == pytest.approx(share, rel=0.1)


def test_sgd_follows_its_recursion() -> None:
    """|w|^2 becomes (1 - r)^2 |w|^2 + r^2 ((d + 1) |w|^2 + d noise^2) / batch at learning rate r, in expectation."""
    problem, batch, rate, steps = LinearRegression(), 64, 0.2, 50
    squared = 16.0
    for step in range(steps):
        r = rate * (1 - step / steps)
        noise = (problem.dimension + 1) * squared + problem.dimension * problem.noise**2
        squared = (1 - r) ** 2 * squared + r**2 * noise / batch
    ends = [problem.train(batch, rate, None, batch * steps, seed)[0] for seed in range(8)]
    excess = [loss - problem.noise**2 / 2 for loss in ends]
    assert sum(excess) / len(excess) == pytest.approx(squared / 2, rel=0.2)


def test_adam_learns_and_the_same_seed_is_the_same_run() -> None:
    problem = LinearRegression()
    loss, curve, seconds = problem.train(64, 0.1, 0.99, 64 * 100, 0)
    assert loss < problem.expected_loss(problem.weights(4.0)) / 2
    assert curve[-1].supervised_tokens == 6400
    assert seconds == pytest.approx(0.1)
    assert problem.train(64, 0.1, 0.99, 64 * 100, 0)[0] == loss


def test_the_formula_has_its_optimum_where_it_says() -> None:
    lab = SyntheticLab(seed_noise=0.0)
    best = lab.best_learning_rate(1024)
    losses = {factor: lab.train(1024, factor * best, None, 10**6, 0)[0] for factor in (0.5, 1.0, 2.0, 20.0)}
    assert losses[0.5] == pytest.approx(losses[2.0])
    assert losses[1.0] == pytest.approx(losses[2.0] - lab.curvature * math.log(2) ** 2)
    assert losses[20.0] == lab.start
    assert lab.best_learning_rate(64) / lab.best_learning_rate(16) == pytest.approx(2.0, rel=0.02)  # far below Bc
    assert lab.expected_loss(1024, best, lab.best_beta2(1024), 10**6) == pytest.approx(losses[1.0])
    assert lab.expected_loss(1024, best, 0.9, 10**6) > losses[1.0]


def test_a_batch_needs_more_tokens_by_one_plus_its_share_of_the_critical_one() -> None:
    lab = SyntheticLab()
    rates = [lab.best_learning_rate(batch) for batch in (1, 4096)]
    assert lab.expected_loss(1, rates[0], None, 10**6) == pytest.approx(
        lab.expected_loss(4096, rates[1], None, 2 * 10**6), abs=1e-3
    )
