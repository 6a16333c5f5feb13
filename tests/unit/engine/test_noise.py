"""Both forms of the noise estimate find the closed form of a linear regression; biased ones do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.lab.synthetic import LinearRegression
from tunewise.engine.noise import NoiseMeter, _stride
from tunewise.engine.noise_sums import NoiseSums
from tunewise.lab.noise_scale import noise_scale

PLAIN = LinearRegression()
ALIKE = LinearRegression(input_likeness=0.5, noise_likeness=0.8)
LENGTHS = (2, 3, 5, 8, 13, 20, 34, 3, 5, 9, 16)
CASES: dict[str, tuple[LinearRegression, list[tuple[int, ...]]]] = {
    "equal micro-batches of tokens": (PLAIN, [(1,) * 8] * 6),
    "unequal micro-batches of tokens": (PLAIN, [(1,) * n for n in (2, 3, 5, 8, 13, 20)]),
    "one document each": (ALIKE, [(n,) for n in LENGTHS]),
    "unequal numbers of documents": (ALIKE, [LENGTHS[:2], LENGTHS[2:3], LENGTHS[3:6], LENGTHS[6:7], LENGTHS[7:]]),
}
NAMES: tuple[Literal["two batches"], Literal["per example"]] = ("two batches", "per example")
SEEDS, BATCHES = 24, 12
Case = tuple[float, list[tuple[list[NoiseSums], list[NoiseSums], list[float]]]]


def measured(
    problem: LinearRegression, micro_batches: Sequence[Sequence[int]], seed: int, scale: float = 1.0
) -> tuple[list[NoiseSums], list[NoiseSums], list[float]]:
    """(two batches, per example, the biased estimate that weighs |G_i|^2 by n_i) of BATCHES global batches."""
    weights, chance = problem.weights(2.0), torch.Generator().manual_seed(seed)
    meter = NoiseMeter([weights])
    whole = sum(map(sum, micro_batches))
    two: list[NoiseSums] = []
    single: list[NoiseSums] = []
    weighed: list[float] = []
    for _ in range(BATCHES):
        weights.grad = torch.zeros_like(weights)
        before, squares = torch.zeros_like(weights), 0.0
        meter.start()
        for lengths in micro_batches:
            documents = [problem.document(length, chance) for length in lengths]
            (scale * problem.loss(weights, documents) / whole).backward()
            meter.after_micro_batch(sum(lengths))
            squares += float((weights.grad - before).square().sum()) * whole / sum(lengths)
            before = weights.grad.clone()
        first, second = meter.finish(whole, scale), meter.per_example(whole, scale)
        assert first is not None
        assert second is not None
        two, single = [*two, first], [*single, second]
        total = float(before.square().sum())
        excess = (squares - total) / (len(micro_batches) - 1)
        weighed.append(excess * whole / (total - excess))
    return two, single, weighed


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    problem, micro_batches = CASES[request.param]
    lengths = [length for each in micro_batches for length in each]
    truth = problem.noise_scale(problem.weights(2.0), lengths)
    return truth, [measured(problem, micro_batches, seed) for seed in range(SEEDS)]


def pooled(sums: Sequence[NoiseSums]) -> float:
    """The ratio of means."""
    return sum(each.variance for each in sums) / sum(each.squared_norm for each in sums)


def mean_of_ratios(sums: Sequence[NoiseSums]) -> float:
    return float(np.mean([each.variance / each.squared_norm for each in sums]))


def of_form(run: tuple[list[NoiseSums], list[NoiseSums], list[float]], form: int) -> list[NoiseSums]:
    return run[0] if form == 0 else run[1]


def error(estimate: Callable[[Sequence[NoiseSums]], float], case: Case, form: int) -> float:
    truth, runs = case
    return abs(estimate([each for run in runs for each in of_form(run, form)]) / truth - 1)


@pytest.mark.parametrize("form", [0, 1], ids=NAMES)
def test_the_closed_form_is_found(case: Case, form: int) -> None:
    truth, runs = case
    assert error(pooled, case, form) < 0.06
    assert error(mean_of_ratios, case, form) > 0.06  # a biased formula fails the same test
    scales = [noise_scale(NAMES[form], of_form(run, form)) for run in runs]
    inside = [scale.low <= truth <= (scale.high or float("inf")) for scale in scales]
    assert sum(inside) >= SEEDS - 4  # 92 % of 300 seeds in the first case: fewer happen to one in a hundred sets


def test_the_two_forms_agree_within_their_intervals(case: Case) -> None:
    for two, single, _ in case[1]:
        first, second = noise_scale("two batches", two), noise_scale("per example", single)
        assert first.low <= (second.high or float("inf"))
        assert second.low <= (first.high or float("inf"))


def test_weighing_documents_by_their_tokens_is_biased() -> None:
    problem, micro_batches = CASES["one document each"]
    truth = problem.noise_scale(problem.weights(2.0), LENGTHS)
    weighed = [each for seed in range(SEEDS) for each in measured(problem, micro_batches, seed)[2]]
    assert np.median(weighed) < 0.5 * truth


def test_the_formulas() -> None:
    """Against the definitions: for equal sizes both are the sample variance, for unequal ones they differ."""
    chance = torch.Generator().manual_seed(0)
    for sizes in ([4, 4, 4], [1, 2, 9]):
        weights = nn.Parameter(torch.zeros(10))
        meter, whole = NoiseMeter([weights]), sum(sizes)
        means = [torch.randn(10, generator=chance) for _ in sizes]
        weights.grad = torch.zeros(10)
        for size, mean in zip(sizes, means, strict=True):
            weights.grad += size / whole * mean
            meter.after_micro_batch(size)
        two, single = meter.finish(whole), meter.per_example(whole)
        assert two is not None
        assert single is not None
        p, mean = torch.tensor(sizes) / whole, weights.grad
        cross = sum(float(p[i] * p[j] * means[i] @ means[j]) for i in range(3) for j in range(3) if i != j)
        assert two.squared_norm == pytest.approx(cross / float(1 - (p**2).sum()), rel=1e-4)
        if sizes[0] == sizes[1]:
            spread = sum(float((each - mean).square().sum()) for each in means) / 2
            assert two.variance == pytest.approx(4 * spread, rel=1e-4)
            assert single.variance == pytest.approx(4 * spread, rel=1e-4)
        else:
            assert single.variance != pytest.approx(two.variance, rel=1e-3)


def test_a_loss_scale_changes_nothing() -> None:
    plain, scaled = (measured(ALIKE, [LENGTHS[:5], LENGTHS[5:]], 0, scale) for scale in (1.0, 1024.0))
    for one, other in zip([*plain[0], *plain[1]], [*scaled[0], *scaled[1]], strict=True):
        assert one.variance == pytest.approx(other.variance, rel=1e-4)
        assert one.squared_norm == pytest.approx(other.squared_norm, rel=1e-4, abs=1e-3)


def test_a_sample_of_the_elements_has_the_same_sums() -> None:
    chance = torch.Generator().manual_seed(0)
    matrix, small = nn.Parameter(torch.zeros(300, 400)), nn.Parameter(torch.zeros(50))
    meters = [NoiseMeter([matrix, small]), NoiseMeter([matrix, small], max_elements=10_000)]
    slope = torch.linspace(0, 1, 300)[:, None]
    matrix.grad, small.grad = torch.zeros(300, 400), None
    for _ in range(4):
        matrix.grad += slope + torch.randn(300, 400, generator=chance)
        for meter in meters:
            meter.after_micro_batch(5)
    whole, sample = (meter.finish(20) for meter in meters)
    assert whole is not None
    assert sample is not None
    assert sample.variance == pytest.approx(whole.variance, rel=0.05)
    assert sample.squared_norm == pytest.approx(whole.squared_norm, rel=0.05)
    assert _stride(matrix, 12) == 13  # 400 and 12 have 4 in common: only every fourth column would be looked at
    assert _stride(small, 12) == 1


def test_what_cannot_be_told_is_none() -> None:
    weights = nn.Parameter(torch.zeros(3))
    meter = NoiseMeter([weights])
    assert meter.finish(10) is None
    meter.after_micro_batch(0)  # nothing supervised: no part of the step
    meter.after_micro_batch(4)
    meter.after_micro_batch(6)
    assert meter.finish(10) is None  # updated in backward: no gradient is left
    with pytest.raises(ValueError, match="micro-batches of 10 supervised tokens in a step of 12"):
        meter.finish(12)
    meter.start()
    weights.grad = torch.tensor([1.0, 2.0, 3.0])
    meter.after_micro_batch(10)
    assert meter.finish(10) is None  # a single micro-batch
    assert meter.per_example(10) is None
    weights.grad = torch.tensor([1.0, float("inf"), 3.0])
    meter.after_micro_batch(10)
    assert meter.finish(20) is None  # fp16 overflowed
