"""`tunewise study batch|methods RECIPE`: one study alone, for the answer and without the final training."""

from __future__ import annotations

import typer

from tunewise.cli.tune import (
    BudgetOption,
    DataOption,
    MachineOption,
    MemoryOption,
    ModelOption,
    OutOption,
    PriceOption,
    RecipeArgument,
    RetryOption,
    SetOption,
    StorageOption,
    WithOption,
    WithoutOption,
    start,
)

app = typer.Typer(help="One study alone: which batch size, or what each method contributes.", no_args_is_help=True)


@app.command()
def batch(
    recipe: RecipeArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    machine: MachineOption = "here",
    budget: BudgetOption = None,
    price: PriceOption = None,
    memory: MemoryOption = None,
    out: OutOption = None,
    settings: SetOption = None,
    storage: StorageOption = None,
    retry: RetryOption = False,
) -> None:
    """Find the batch size that gives the best result, and the cheapest one that does as well."""
    start(
        "batch", recipe, model=model, data=data, machine=machine, budget=budget, price=price, memory=memory, out=out,
        wanted=None, unwanted=None, settings=settings, storage=storage, retry=retry,
    )  # fmt: skip


@app.command()
def methods(
    recipe: RecipeArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    machine: MachineOption = "here",
    budget: BudgetOption = None,
    price: PriceOption = None,
    memory: MemoryOption = None,
    out: OutOption = None,
    wanted: WithOption = None,
    unwanted: WithoutOption = None,
    settings: SetOption = None,
    storage: StorageOption = None,
    retry: RetryOption = False,
) -> None:
    """Measure what each method contributes: alone, added up, left out, and in interaction."""
    start(
        "methods", recipe, model=model, data=data, machine=machine, budget=budget, price=price, memory=memory, out=out,
        wanted=wanted, unwanted=unwanted, settings=settings, storage=storage, retry=retry,
    )  # fmt: skip
