"""Each optimizer against its formula for several steps, and what a recipe cannot ask of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.built import make_recipe, make_run
from tunewise.errors import Conflict
from tunewise.methods.fp8_lm import FP8LM
from tunewise.methods.lean_optimizers import AdamMini, AdamW4bit, Apollo
from tunewise.methods.optimizers import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    AdamW8bit,
    Lion,
    Optimizer,
    PagedAdamW8bit,
    RMSProp,
)
from tunewise.methods.packing import Packing
from tunewise.methods.precision import Precision
from tunewise.recipe import BatchSpec, TrainingSpec

RATE, DECAY, STEPS = 0.1, 0.05, 8
UNCLIPPED = TrainingSpec(max_grad_norm=None)
RTOL = dict.fromkeys(("adam_mini", "adamw_4bit", "apollo", "fp8_lm"), 2e-5)
"""Those that compute in fp32 whatever the parameter is."""

ON_CPU: tuple[Optimizer, ...] = (
    SGD(),
    SGD(momentum=0.9),
    SGD(momentum=0.9, nesterov=True),
    Adagrad(),
    RMSProp(),
    Adam(),
    AdamW(),
    AdamW8bit(),
    Adafactor(),
    Lion(),
    RMSProp(momentum=0.9, nesterov=True),
    AdamW4bit(),
    AdamMini(),
    Apollo(rank=4),
    Apollo(rank=1, scale="tensor", update_every=2),
    FP8LM(),
)


def gradient(theta: Tensor, step: int) -> Tensor:
    """Of an ill-conditioned bowl whose middle moves with the step."""
    return torch.linspace(0.1, 2.0, theta.numel(), dtype=theta.dtype).view_as(theta) * (theta - 0.3 * step)


def start(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (3, 4)) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def ours(method: Optimizer, weight_decay: float = 0.0, shape: tuple[int, ...] = (3, 4)) -> Tensor:
    """Return the weights after some steps of the optimizer that the method makes."""
    parameter = nn.Parameter(start(shape=shape))
    optimizer = method.make(
        [{"params": [parameter], "lr": 0.0, "weight_decay": weight_decay, "learning_rate_factor": 1.0}]
    )
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE
        parameter.grad = gradient(parameter.detach(), step)
        optimizer.step()
    return parameter.detach()


def sgd(theta: Tensor) -> Tensor:
    for step in range(STEPS):
        theta = theta - RATE * gradient(theta, step)
    return theta


def momentum(theta: Tensor) -> Tensor:
    velocity = torch.zeros_like(theta)
    for step in range(STEPS):
        velocity = 0.9 * velocity - RATE * gradient(theta, step)
        theta = theta + velocity
    return theta


def nesterov(theta: Tensor) -> Tensor:
    """Algorithm 8.3; returned is the interim point theta + alpha v, which torch stores."""
    velocity = torch.zeros_like(theta)
    for step in range(STEPS):
        velocity_next = 0.9 * velocity - RATE * gradient(theta + 0.9 * velocity, step)
        theta, velocity = theta + velocity_next, velocity_next
    return theta + 0.9 * velocity


def adagrad(theta: Tensor) -> Tensor:
    squares = torch.zeros_like(theta)
    for step in range(STEPS):
        g = gradient(theta, step)
        squares = squares + g * g
        theta = theta - RATE / (1e-10 + squares.sqrt()) * g
    return theta


def rmsprop(theta: Tensor) -> Tensor:
    squares = torch.zeros_like(theta)
    for step in range(STEPS):
        g = gradient(theta, step)
        squares = 0.9 * squares + 0.1 * g * g
        theta = theta - RATE * g / (squares.sqrt() + 1e-8)
    return theta


def adam(theta: Tensor, coupled: float = 0.0, decoupled: float = 0.0) -> Tensor:
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(STEPS):
        g = gradient(theta, step) + coupled * theta
        theta = theta * (1 - RATE * decoupled)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        theta = theta - RATE * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return theta


def nesterov_rmsprop(theta: Tensor) -> Tensor:
    """Algorithm 8.6 with eps beside the root; returned is the interim point, which our optimizer stores."""
    velocity, squares = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(STEPS):
        g = gradient(theta + 0.9 * velocity, step)
        squares = 0.99 * squares + 0.01 * g * g
        velocity = 0.9 * velocity - RATE * g / (squares.sqrt() + 1e-8)
        theta = theta + velocity
    return theta + 0.9 * velocity


def adam_mini(theta: Tensor) -> Tensor:
    """Algorithm 1 of Zhang et al. with a block a row."""
    first, second = torch.zeros_like(theta), torch.zeros(theta.shape[0], 1, dtype=theta.dtype)
    for step in range(STEPS):
        g = gradient(theta, step)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square().mean(1, keepdim=True)
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        theta = theta - RATE * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return theta


def lion(theta: Tensor) -> Tensor:
    mean = torch.zeros_like(theta)
    for step in range(STEPS):
        g = gradient(theta, step)
        theta = theta - RATE * torch.sign(0.9 * mean + 0.1 * g)
        mean = 0.99 * mean + 0.01 * g
    return theta


def adafactor(theta: Tensor) -> Tensor:
    """Algorithm 5 of Shazeer and Stern with torch's relative step, min(lr, 1 / sqrt(t))."""
    rows, columns = torch.zeros(theta.shape[0], 1).double(), torch.zeros(1, theta.shape[1]).double()
    for step in range(1, STEPS + 1):
        g = gradient(theta, step - 1)
        keep = 1 - step**-0.8
        rows = keep * rows + (1 - keep) * g.square().mean(1, keepdim=True)
        columns = keep * columns + (1 - keep) * g.square().mean(0, keepdim=True)
        variance = rows @ columns / rows.mean()
        update = g / variance.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        scale = max(1e-3, float(theta.square().mean().sqrt())) * min(RATE, step**-0.5)
        theta = theta - scale * update
    return theta


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        (SGD(), sgd),
        (SGD(momentum=0.9), momentum),
        (SGD(momentum=0.9, nesterov=True), nesterov),
        (Adagrad(), adagrad),
        (RMSProp(decay=0.9), rmsprop),
        (RMSProp(momentum=0.9, nesterov=True), nesterov_rmsprop),
        (Adam(), adam),
        (Adam(fused=False), adam),
        (AdamW(), adam),
        (AdamW(fused=False), adam),
        (Lion(), lion),
        (Adafactor(), adafactor),
        (AdamMini(), adam_mini),
        (AdamW8bit(), adam),  # so small a tensor keeps fp32 moments
        (AdamW4bit(), adam),  # likewise
        (Apollo(), adam),  # and a matrix of a lower rank than the projection its own moments
        (FP8LM(first_moment="fp32", second_moment="fp32", master="fp32", gradient="fp32"), adam),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_formula(method: Optimizer, formula: Callable[[Tensor], Tensor]) -> None:
    torch.testing.assert_close(ours(method), formula(start()), rtol=RTOL.get(method.name, 1e-6), atol=1e-8)


def test_weight_decay_is_coupled_in_adam_and_decoupled_in_adamw() -> None:
    coupled, decoupled = adam(start(), coupled=DECAY), adam(start(), decoupled=DECAY)
    torch.testing.assert_close(ours(Adam(), DECAY), coupled, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours(AdamW(), DECAY), decoupled, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(coupled, decoupled)


def test_8bit_adamw_starts_like_adamw() -> None:
    """Its first moments are exact zeros, so the first step has only the rounding of fp32."""
    pytest.importorskip("bitsandbytes")
    results = []
    for method in (AdamW8bit(), AdamW()):
        parameter = nn.Parameter(start(torch.float32, (128, 64)))
        optimizer = method.make([{"params": [parameter], "lr": RATE, "weight_decay": DECAY}])
        optimizer.param_groups[0]["lr"] = RATE
        parameter.grad = gradient(parameter.detach(), 1)
        optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ON_CPU, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_plain_and_goes_on_bit_for_bit(method: Optimizer, dtype: torch.dtype) -> None:
    if isinstance(method, AdamW8bit):
        pytest.importorskip("bitsandbytes")

    def make(values: Tensor) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(values.clone())
        return parameter, method.make([{"params": [parameter], "lr": RATE, "weight_decay": DECAY}])

    def advance(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        for step in range(3):
            optimizer.param_groups[0]["lr"] = RATE
            parameter.grad = gradient(parameter.detach(), step)
            optimizer.step()

    parameter, optimizer = make(start(dtype, (128, 64)))
    advance(parameter, optimizer)
    state: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    for value in state["state"].get(0, {}).values():
        assert isinstance(value, Tensor | int | float)
    resumed_parameter, resumed = make(parameter.detach())
    resumed.load_state_dict(state)
    advance(parameter, optimizer)
    advance(resumed_parameter, resumed)
    assert torch.equal(resumed_parameter, parameter)


def test_apply() -> None:
    run = make_run(nn.Linear(2, 2), AdamW(in_backward=True), training=UNCLIPPED)
    assert run.update_in_backward
    assert isinstance(run.make_optimizer([{"params": list(run.model.parameters())}]), torch.optim.AdamW)
    assert not make_run(nn.Linear(2, 2), AdamW()).update_in_backward


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "max_grad_norm to null"),
        (
            {"training": UNCLIPPED, "batch": BatchSpec(micro_batch_size=2, gradient_accumulation_steps=3)},
            "accumulated",
        ),
        ({"training": UNCLIPPED, "batch": BatchSpec(documents=8, micro_batch_size=2)}, "accumulated"),
        ({"training": UNCLIPPED, "batch": BatchSpec(documents=8, micro_batch_size=8)}, None),
    ],
)
def test_in_backward_conflicts(changes: dict[str, Any], words: str | None) -> None:
    problem = AdamW(in_backward=True).conflict(make_recipe(AdamW(in_backward=True), **changes))
    assert problem is None if words is None else words in str(problem)
    assert AdamW().conflict(make_recipe(AdamW(), **changes)) is None


def test_in_backward_with_packing_or_fp16() -> None:
    method, batch = SGD(in_backward=True), BatchSpec(documents=8, micro_batch_size=1)
    packed = make_recipe(method, Packing(row_tokens=64), training=UNCLIPPED, batch=batch)
    assert method.conflict(packed) is None  # eight documents may lie in one row
    scaled = make_recipe(method, Precision(compute="fp16"), training=UNCLIPPED)
    assert "unscale" in str(method.conflict(scaled))


def test_other_conflicts() -> None:
    assert "momentum" in str(SGD(nesterov=True).conflict(make_recipe()))
    assert "momentum" in str(RMSProp(nesterov=True).conflict(make_recipe()))
    assert "CUDA" in str(PagedAdamW8bit().conflict(make_recipe(device="cpu")))
    assert PagedAdamW8bit().conflict(make_recipe(device="cuda")) is None
    with pytest.raises(Conflict, match="CUDA"):
        make_run(nn.Linear(2, 2), PagedAdamW8bit())
