"""Lion against its paper's formula; 8-bit AdamW's bytes, its distance from 32-bit AdamW and its saved
state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunewise.layers.optimizers import Lion, adamw_8bit


def groups(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, decay: float = 0.0) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return [{"params": parameters, "lr": 1e-3, "weight_decay": decay, "learning_rate_factor": 1.0}]


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    """Take steps along noisy gradients of |w - target|^2 / 2."""
    torch.manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = (parameter.detach() - 0.5) + 0.3 * torch.randn_like(parameter)
        optimizer.step()


def test_lion_follows_algorithm_2() -> None:
    held = groups((5, 3), decay=0.1)
    optimizer = Lion(held, betas=(0.8, 0.95))
    parameter = held[0]["params"][0]
    expected, momentum = parameter.detach().double().clone(), torch.zeros(5, 3, dtype=torch.float64)
    for step in range(6):
        gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient
        optimizer.step()
        update = torch.sign(0.8 * momentum + 0.2 * gradient)
        expected -= 1e-3 * (update + 0.1 * expected)
        momentum = 0.95 * momentum + 0.05 * gradient
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_lion_skips_what_has_no_gradient_and_calls_closures() -> None:
    held = groups((3,), (3,))
    optimizer = Lion(held)
    first, second = held[0]["params"]
    before = second.detach().clone()
    first.grad = torch.ones(3)
    assert optimizer.step(lambda: 5.0) == 5.0
    assert torch.equal(second, before)
    assert len(optimizer.state) == 1


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for entries in optimizer.state_dict()["state"].values() for value in entries.values()]


def test_8bit_bytes() -> None:
    pytest.importorskip("bitsandbytes")
    held = groups((256, 128), (100,))
    optimizer = adamw_8bit(held, (0.9, 0.999), 1e-8)
    train(optimizer, 1, seed=1)
    large, small = optimizer.state_dict()["state"].values()
    assert all(isinstance(value, Tensor | int) for entries in (large, small) for value in entries.values())
    count = 256 * 128
    moments = sum(large[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    assert moments == 2 * count + 2 * 4 * (count // 256)
    assert small["state1"].dtype == torch.float32  # fewer than 4096 numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_stays_near_32bit(dtype: torch.dtype) -> None:
    """After 50 steps: within 5 % of the way that 32-bit AdamW has gone (bf16: weights round too, 15 %)."""
    pytest.importorskip("bitsandbytes")
    ours, theirs = groups((128, 64), dtype=dtype, decay=0.1), groups((128, 64), decay=0.1)
    start = theirs[0]["params"][0].detach().clone()
    for held, optimizer in (
        (ours, adamw_8bit(ours, (0.9, 0.999), 1e-8)),
        (theirs, torch.optim.AdamW(theirs, betas=(0.9, 0.999), eps=1e-8)),
    ):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        torch.manual_seed(1)
        noise = torch.randn(50, 128, 64)
        for step in range(50):
            parameter = held[0]["params"][0]
            parameter.grad = (parameter.detach() - 0.5 + 0.3 * noise[step]).to(parameter.dtype)
            optimizer.step()
    end, expected = (held[0]["params"][0].detach().float() for held in (ours, theirs))
    distance = float((end - expected).norm() / (expected - start).norm())
    assert distance < (0.05 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    held = groups((128, 64), (10,), dtype=dtype)
    optimizer = adamw_8bit(held, (0.9, 0.999), 1e-8)
    train(optimizer, 3, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed_groups = [
        {**group, "params": [nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]}
        for group in held
    ]
    resumed = adamw_8bit(resumed_groups, (0.9, 0.999), 1e-8)
    resumed.load_state_dict(saved)
    train(optimizer, 3, seed=2)
    train(resumed, 3, seed=2)
    for ours, theirs in zip(tensors(resumed), tensors(optimizer), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    for our_parameter, their_parameter in zip(resumed_groups[0]["params"], held[0]["params"], strict=True):
        assert torch.equal(our_parameter, their_parameter)
