"""The laws of the update: what is frozen stays bit-equal, updates inside backward are the same updates, and other
precisions stay within their rounding; over every learning problem and every optimizer that runs on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.laws.test_same_gradients import PROBLEMS, TOLERANCES, corpus, loss_and_gradients, make_run, reference
from tunewise.engine.step import gradients, parameter_groups, set_learning_rate, update, update_in_backward
from tunewise.methods import (
    ALL,
    FP8LM,
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamMini,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    Apollo,
    Lion,
    PagedAdamW8bit,
    Precision,
    RMSProp,
)
from tunewise.methods.method import Run
from tunewise.recipe import Method, Slot

OPTIMIZERS: dict[str, Method] = {
    method.name: method
    for method in (
        SGD(), Adagrad(), RMSProp(momentum=0.5, nesterov=True), Adam(), AdamW(), AdamW8bit(), Adafactor(), Lion(),
        AdamW4bit(), AdamMini(), Apollo(rank=2), FP8LM(),
    )
}  # fmt: skip
INSIDE = {**OPTIMIZERS, "fp8_lm": FP8LM(gradient="fp32")}  # inside backward no gradient waits, so none is stored
STEPS = 2


def state_of(run: Run) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in run.model.state_dict().items()}


def train(run: Run, is_in_backward: bool) -> None:
    optimizer = run.make_optimizer(parameter_groups(run))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    if is_in_backward:
        update_in_backward(run, optimizer)
    num_supervised = int(corpus().num_supervised.sum())
    rows = run.layout.micro_batches(range(len(corpus())), corpus().lengths)
    for _ in range(STEPS):
        set_learning_rate(optimizer, 1e-2)
        gradients(run, [run.layout.build(part, corpus()) for part in rows], num_supervised, scaler)
        if not is_in_backward:
            update(run, optimizer, scaler)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_is_frozen_stays_bit_equal_and_what_is_trained_moves(problem: str, optimizer: str) -> None:
    run = make_run((*PROBLEMS[problem], OPTIMIZERS[optimizer]), micro_batch_size=3)
    trained = {name for name, _ in run.trainable()}
    before = state_of(run)
    train(run, is_in_backward=False)
    after = state_of(run)
    assert trained <= before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - trained)
    assert all(not torch.equal(before[name], after[name]) for name in trained)


@pytest.mark.parametrize("optimizer", INSIDE)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_updates_inside_backward_are_the_same_updates(problem: str, optimizer: str) -> None:
    plain = make_run((*PROBLEMS[problem], INSIDE[optimizer]), micro_batch_size=7)
    train(plain, is_in_backward=False)
    inside = make_run((*PROBLEMS[problem], INSIDE[optimizer]), micro_batch_size=7)
    train(inside, is_in_backward=True)
    assert all(parameter.grad is None for _, parameter in inside.trainable())
    expected = dict(plain.trainable())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in inside.trainable())


@pytest.mark.parametrize("precision", [Precision(compute="bf16"), Precision(compute="fp16")], ids=lambda p: p.compute)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_other_precisions_stay_within_their_rounding(problem: str, precision: Precision) -> None:
    """16-bit numbers have 8 (bf16) or 11 (fp16) bits: after three blocks gradients point within a few percent."""
    expected_loss, expected = reference(problem)
    loss, found = loss_and_gradients(make_run((*PROBLEMS[problem], precision), micro_batch_size=7))
    assert loss == pytest.approx(expected_loss, rel=2e-2 if precision.compute == "bf16" else 2e-3)
    ours = torch.cat([found[name].flatten().double() for name in expected])
    theirs = torch.cat([gradient.flatten().double() for gradient in expected.values()])
    is_coarse = precision.compute == "bf16" or problem in TOLERANCES  # whose own numbers have fewer bits than fp16's
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > (0.995 if is_coarse else 0.9999)


def test_the_number_of_cases_does_not_fall() -> None:
    every_optimizer = {method for method in ALL if method.slot == Slot.OPTIMIZER}
    assert {type(method) for method in OPTIMIZERS.values()} | {PagedAdamW8bit} == every_optimizer  # that needs CUDA
    assert len(PROBLEMS) * len(OPTIMIZERS) == 180
