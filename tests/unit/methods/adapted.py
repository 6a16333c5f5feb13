"""Runs with adapters on tiny models, built as `engine.build` does, without what adapters do not concern."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.unit.architectures import VOCAB_SIZE
from tunewise.methods.method import Run
from tunewise.recipe import DataSpec, Method, ModelSpec, Recipe, Slot
from tunewise.workload.batches import Layout


def make_recipe(*methods: Method, seed: int = 0) -> Recipe:
    return Recipe(model=ModelSpec(name="tiny"), data=DataSpec(source="none"), methods=methods, seed=seed)


def make_run(model: nn.Module, *methods: Method, seed: int = 0, is_dry: bool = False) -> Run:
    """Return a run of `model` to which the methods have been applied in the order of their slots."""

    def nothing(run: Any, batch: Any = None) -> Any:
        raise AssertionError("not needed here")

    recipe = make_recipe(*methods, seed=seed)
    run = Run(
        recipe=recipe,
        device=torch.device("cpu"),
        model=model,
        layout=Layout(micro_batch_size=1),
        loss=nothing,
        make_optimizer=nothing,
        is_dry=is_dry,
    )
    for slot in Slot:
        if slot == Slot.ADAPTER and recipe.in_slot(slot):
            run.model.requires_grad_(False)
        for method in recipe.in_slot(slot):
            method.apply(run)
    return run


def token_ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model.eval()(input_ids=token_ids(), use_cache=False).logits
    return output


def disturb(model: nn.Module, amount: float = 0.1) -> None:
    """Change every trainable parameter at random, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=amount)
