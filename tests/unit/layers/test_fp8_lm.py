"""Scaled formats, FP8-LM's AdamW against the plain formula, its bytes, and the rule of automatic scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunewise.layers.fp8_lm import FP8LMAdamW, StoredGradients
from tunewise.layers.scaled_numbers import NumberFormat, decode, encode

ROUNDING: dict[NumberFormat, float] = {
    "fp32": 0.0,
    "bf16": 2**-8,
    "fp16": 2**-11,
    "fp8": 2**-4,
    "fp8_e5m2": 2**-3,
}
"""Half the distance of neighbours, relative to a number."""


@pytest.mark.parametrize("number_format", ROUNDING)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e10])
def test_storing_rounds_relatively_whatever_the_size(number_format: NumberFormat, size: float) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul_(size)
    found = decode(*encode(values, number_format))
    error = (found - values).abs()
    large = values.abs() > 0.05 * values.abs().max()  # far above the smallest normal number
    assert float((error / values.abs())[large].max()) <= ROUNDING[number_format]
    assert bool(torch.isfinite(found).all())
    assert torch.equal(decode(*encode(found, number_format)), found)  # storing twice changes nothing


@pytest.mark.parametrize("number_format", ROUNDING)
def test_zeros_stay_zeros(number_format: NumberFormat) -> None:
    assert torch.equal(decode(*encode(torch.zeros(5), number_format)), torch.zeros(5))


def train(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        ((parameter.float() - 0.5 + noise) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def start(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(dtype))


def way(**options: Any) -> Tensor:
    """Return how 30 steps moved the weights."""
    parameter = start()
    train(FP8LMAdamW([parameter], lr=1e-2, weight_decay=0.1, **options), parameter, 30)
    return parameter.detach() - start().detach()


def torch_way() -> Tensor:
    parameter = start()
    train(torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1), parameter, 30)
    return parameter.detach() - start().detach()


def test_in_fp32_it_is_torchs_adamw() -> None:
    options = dict.fromkeys(("gradient", "first_moment", "second_moment", "master"), "fp32")
    torch.testing.assert_close(way(**options), torch_way(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 0.08),
        ({"first_moment": "fp32", "second_moment": "fp32", "master": "fp32"}, 0.05),
        ({"gradient": "fp32", "second_moment": "fp32", "master": "fp32"}, 0.05),
        ({"gradient": "fp32", "first_moment": "fp32", "master": "fp32"}, 0.005),
        ({"gradient": "fp32", "first_moment": "fp32", "second_moment": "fp32"}, 0.02),
    ],
    ids=["all", "gradient fp8", "first moment fp8", "second moment fp16", "master fp16"],
)
def test_its_formats_stay_near_fp32(options: dict[str, Any], tolerance: float) -> None:
    expected = torch_way()
    assert float((way(**options) - expected).norm() / expected.norm()) < tolerance


def test_a_second_moment_in_fp8_is_worse_and_cannot_change_slowly() -> None:
    """A thousandth a step is less than half of FP8's distance, so what is stored never moves."""
    expected = torch_way()
    errors = {}
    for number_format in ("fp16", "fp8"):
        options = {"gradient": "fp32", "first_moment": "fp32", "master": "fp32", "second_moment": number_format}
        errors[number_format] = float((way(**options) - expected).norm() / expected.norm())
    assert errors["fp8"] > 20 * errors["fp16"]


def test_six_bytes_a_parameter() -> None:
    parameter = start(torch.bfloat16)
    optimizer = FP8LMAdamW([parameter])
    ((parameter.float() - 1.0) ** 2).sum().backward()
    assert parameter.grad is None
    assert optimizer.stored_gradients is not None
    gradient = sum(tensor.nbytes for tensor in optimizer.stored_gradients.tensors())
    optimizer.step()
    state = sum(value.nbytes for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    count, scales = parameter.numel(), 4 * 4
    assert gradient + state == 6 * count + scales
    optimizer.zero_grad()
    assert optimizer.stored_gradients.tensors() == []


def test_clipping_changes_only_the_scale() -> None:
    parameter = start()
    optimizer = FP8LMAdamW([parameter])
    (parameter**2).sum().backward()
    assert optimizer.stored_gradients is not None
    (stored, _), before = optimizer.stored_gradients._stored[parameter], optimizer.stored_gradients.of(parameter)
    norm = optimizer.clip_gradients(1.0)
    assert before is not None
    torch.testing.assert_close(norm, before.norm())
    (after, _), clipped = optimizer.stored_gradients._stored[parameter], optimizer.stored_gradients.of(parameter)
    assert after is stored
    assert clipped is not None
    torch.testing.assert_close(clipped, before / norm, rtol=1e-5, atol=1e-7)
    assert float(optimizer.clip_gradients(None)) == pytest.approx(1.0, rel=1e-4)


def test_micro_batches_add_up_and_overflow_is_counted() -> None:
    parameter, gradients = nn.Parameter(torch.zeros(1000)), StoredGradients("fp8")
    first = torch.linspace(0.5, 1.0, 1000)
    for part in (first, first):
        parameter.grad = part.clone()
        gradients.take(parameter, 1.0)
    total = gradients.of(parameter)
    assert total is not None
    assert gradients.overflow_ratio() == 0.0  # there is room for the largest number one and a half times
    torch.testing.assert_close(total, 2 * first, rtol=2**-3, atol=0.0)
    gradients.clear()
    for part in (first, 3 * first):
        parameter.grad = part.clone()
        gradients.take(parameter, 1.0)
    largest = 448 / 2**7  # the scale of the first part is 2^7
    expected = float((4 * first > largest).sum()) / 2000  # of all numbers that were stored, twice a thousand
    assert 0.0 < gradients.overflow_ratio() == pytest.approx(expected, abs=0.03)


def test_mu_halves_on_overflow_and_doubles_in_a_window() -> None:
    parameter = nn.Parameter(torch.ones(2000))
    optimizer = FP8LMAdamW([parameter], window=10)

    def step(*factors: float) -> float:
        for factor in factors:
            (parameter * factor).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(optimizer.param_groups[0]["gradient_multiplier"])

    assert [step(1.0) for _ in range(10)][-1] == pytest.approx(2.0)
    assert step(1.0, 5.0) == pytest.approx(1.0)
    assert optimizer.state_dict()["param_groups"][0]["gradient_multiplier"] == pytest.approx(1.0)
