"""kl_to_base and l2_sp inside a run: against a second model, and against the gradient of the penalty written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.laws.test_same_gradients import corpus, loss_and_gradients, make_run
from tunewise.engine.evaluate import validation_loss
from tunewise.engine.step import gradients, parameter_groups, set_learning_rate, update, update_in_backward
from tunewise.errors import Conflict
from tunewise.layers.lora import adapters_off, lora_layers
from tunewise.methods import L2SP, SGD, AdamW, Checkpointing, Freeze, KLToBase, LoRA, Packing, Quantize
from tunewise.methods.compatibility import conflicts
from tunewise.methods.method import Run
from tunewise.recipe import Method
from tunewise.workload.batches import IGNORED, Layout

BETA = 0.7
BASES: dict[str, tuple[Method, ...]] = {
    "plain": (LoRA(rank=4),),
    "nf4": (LoRA(rank=4), Quantize(kind="nf4")),
    "adapted head": (LoRA(rank=4, target_modules=("q_proj", "down_proj", "lm_head")),),
    "dropout": (LoRA(rank=4, dropout=0.3),),
}


def whole_batch() -> Any:
    layout = Layout(micro_batch_size=7)
    return layout.build(layout.micro_batches(range(7), corpus().lengths)[0], corpus())


def logits_of(model: nn.Module) -> Tensor:
    batch = whole_batch()
    found: Tensor = model(input_ids=batch.input_ids_RL, position_ids=batch.position_ids_RL, use_cache=False).logits
    return found


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("base", ["plain", "adapted head", "dropout"])
def test_switched_off_is_the_base(init: Any, base: str) -> None:
    lora = BASES[base][0].model_copy(update={"init": init})
    run, expected = make_run((lora,), 7), make_run((), 7)
    run.model.eval()
    adapted = logits_of(run.model)
    with adapters_off(run.model):
        off = logits_of(run.model)
    torch.testing.assert_close(off, logits_of(expected.model.eval()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, off, atol=1e-3)
    assert torch.equal(logits_of(run.model), adapted), "and on again afterwards"


@pytest.mark.parametrize("base", BASES)
def test_loss_and_gradients_are_those_of_a_second_model(base: str) -> None:
    run = make_run((*BASES[base], KLToBase(beta=BETA, chunk_tokens=5)), micro_batch_size=7)
    second = copy.deepcopy(run.model).eval()
    for layer in lora_layers(second).values():
        layer.lora_B.weight.detach().zero_()
    torch.manual_seed(5)
    found_loss, found = loss_and_gradients(run)
    for _, parameter in run.trainable():
        parameter.grad = None
    batch = whole_batch()
    where = batch.labels_RL != IGNORED
    torch.manual_seed(5)
    run.documents.lengths = batch.document_lengths
    logp = logits_of(run.model)[where].log_softmax(-1)
    with torch.no_grad():
        base_logp = logits_of(second)[where].log_softmax(-1)
    divergence = (base_logp.exp() * (base_logp - logp)).sum()
    loss = (functional.nll_loss(logp, batch.labels_RL[where], reduction="sum") + BETA * divergence) / where.sum()
    loss.backward()
    assert found_loss == pytest.approx(loss.item(), rel=1e-5)
    assert float(divergence) > 1e-3
    for name, parameter in run.trainable():
        assert parameter.grad is not None
        error = float((found[name] - parameter.grad).norm() / parameter.grad.norm())
        assert error < 1e-4, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("extra", [(Packing(row_tokens=64),), (Checkpointing(),), (Checkpointing(policy="selective"),)])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_rows_micro_batches_and_checkpointing_change_nothing(extra: tuple[Method, ...], micro_batch_size: int) -> None:
    plain = loss_and_gradients(make_run((LoRA(rank=4), KLToBase(beta=BETA)), 7))
    found = loss_and_gradients(make_run((LoRA(rank=4), KLToBase(beta=BETA), *extra), micro_batch_size))
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    for name, gradient in plain[1].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm()) < 1e-4


def test_validation_is_plain_cross_entropy() -> None:
    losses = [
        validation_loss(run, corpus(), range(7), run.layout)
        for run in (make_run((LoRA(rank=4), KLToBase(beta=50.0)), 7), make_run((LoRA(rank=4),), 7))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] is not None
    assert loss_and_gradients(make_run((LoRA(rank=4), KLToBase(beta=50.0)), 7))[0] > losses[0] + 1e-3


@pytest.mark.parametrize(
    ("methods", "word"),
    [
        ((KLToBase(),), "add lora"),
        ((LoRA(modules_to_save=("embed_tokens",)), KLToBase()), "stays as it is"),
        ((LoRA(), Freeze(train=("*norm*",)), KLToBase()), "stays as it is"),
        ((LoRA(), L2SP(), AdamW(in_backward=True)), "in_backward"),
    ],
)
def test_what_is_refused(methods: tuple[Method, ...], word: str) -> None:
    with pytest.raises(Conflict, match=word):
        make_run(methods, 7)


def test_without_factors_the_pull_may_be_inside_backward() -> None:
    recipe = make_run((), 7).recipe
    assert L2SP().conflict(recipe.replace(methods=(Freeze(train=("*norm*",)), AdamW(in_backward=True)))) is None
    ends = []
    for is_inside in (False, True):
        methods = (Freeze(train=("*norm*",)), SGD(), L2SP(strength=20.0))
        run = make_run(methods, 7)
        assert (
            conflicts(run.recipe.replace(training=run.recipe.training.model_copy(update={"max_grad_norm": None}))) == []
        )
        optimizer, scaler = run.make_optimizer(parameter_groups(run)), torch.amp.GradScaler("cpu", enabled=False)
        set_learning_rate(optimizer, 1e-2)
        if is_inside:
            update_in_backward(run, optimizer)
        for _ in range(3):
            gradients(run, [whole_batch()], int(corpus().num_supervised.sum()), scaler)
            if not is_inside:
                update(run, optimizer, scaler)
        ends.append([parameter.detach() for _, parameter in run.trainable()])
    assert all(torch.equal(plain, inside) for plain, inside in zip(*ends, strict=True))


def test_a_second_loss_is_refused() -> None:
    recipe = make_run((LoRA(rank=4), KLToBase()), 7).recipe
    from_user = recipe.replace(methods=(*(recipe.methods or ()), make_run((), 7).recipe.in_slot(KLToBase.slot)[0]))
    assert any("both set the loss" in problem for problem in conflicts(from_user))


@torch.no_grad()
def changes(run: Run) -> list[Tensor]:
    """Return what LoRA adds to each weight."""
    return [layer.scale * layer.lora_B.weight @ layer.lora_A.weight for layer in lora_layers(run.model).values()]


def one_step(run: Run, rate: float) -> None:
    optimizer = run.make_optimizer(parameter_groups(run))
    move(run)  # away from the start, where there is no pull
    set_learning_rate(optimizer, rate)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gradients(run, [whole_batch()], int(corpus().num_supervised.sum()), scaler)
    update(run, optimizer, scaler)


def move(run: Run) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in run.trainable():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ["full", "lora", "pissa", "lora and norms"])
def test_one_step_of_sgd_is_the_gradient_of_the_penalty(kind: str) -> None:
    """L2-SP: loss + strength / 2 * |W - W_0|^2, where W_0 is the base for LoRA, the start for the rest."""
    strength, rate = 0.3, 0.05
    problem: tuple[Method, ...] = {
        "full": (),
        "lora": (LoRA(rank=4),),
        "pissa": (LoRA(rank=4, init="pissa"),),
        "lora and norms": (LoRA(rank=4), Freeze(train=("*norm*",))),
    }[kind]
    found = make_run((*problem, SGD(), L2SP(strength=strength)), 7)
    expected = make_run((*problem, SGD()), 7)
    start = {name: parameter.detach().clone() for name, parameter in expected.trainable()}
    one_step(found, rate)
    move(expected)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gradients(expected, [whole_batch()], int(corpus().num_supervised.sum()), scaler)
    penalty = torch.zeros(())
    for layer in lora_layers(expected.model).values():
        change = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
        if layer.initial_a is not None and layer.initial_b is not None:
            change = change - layer.scale * layer.initial_b @ layer.initial_a
        penalty = penalty + strength / 2 * change.square().sum()
    for name, parameter in expected.trainable():
        if ".lora_" not in name:
            penalty = penalty + strength / 2 * (parameter - start[name]).square().sum()
    assert float(penalty) > 0.0
    penalty.backward()
    with torch.no_grad():
        for _, parameter in expected.trainable():
            assert parameter.grad is not None
            parameter.sub_(rate * parameter.grad)
    wanted = dict(expected.trainable())
    for name, parameter in found.trainable():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-5, atol=1e-6)


def test_a_strong_pull_ends_nearer_to_the_base() -> None:
    norms = []
    for extra in ((), (L2SP(strength=20.0),)):
        run = make_run((LoRA(rank=4), *extra), 7)
        optimizer, scaler = run.make_optimizer(parameter_groups(run)), torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(20):
            set_learning_rate(optimizer, 1e-2)
            gradients(run, [whole_batch()], int(corpus().num_supervised.sum()), scaler)
            update(run, optimizer, scaler)
        norms.append(sum(float(change.square().sum()) for change in changes(run)) ** 0.5)
    assert norms[1] < 0.8 * norms[0]


def test_a_step_that_fp16_skips_is_not_pulled() -> None:
    run = make_run((LoRA(rank=4), AdamW(fused=True), L2SP()), 7)
    optimizer = run.make_optimizer(parameter_groups(run))
    before = [parameter.detach().clone() for _, parameter in run.trainable()]
    for _, parameter in run.trainable():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 1.0)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(parameter, old) for (_, parameter), old in zip(run.trainable(), before, strict=True))
