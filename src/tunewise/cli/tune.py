"""`tunewise tune RECIPE`: batch size first, then the methods, then the training, and a report of all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunewise.cli.train import refuse_failed
from tunewise.errors import InputError

RecipeArgument = Annotated[Path | None, typer.Argument(help="A recipe in YAML; where the search starts.")]
ModelOption = Annotated[str | None, typer.Option(help="Hub id, folder, or 'embedded'.")]
DataOption = Annotated[str | None, typer.Option(help="File, folder, hub data set id, or 'stdlib'.")]
MachineOption = Annotated[str, typer.Option(help="'here', or the YAML file of this machine (tunewise machine).")]
BudgetOption = Annotated[
    str | None, typer.Option(help="Time for everything: 30m, 2h; or money: $5, with --price per hour.")
]
PriceOption = Annotated[float | None, typer.Option(help="Price of this machine per hour.")]
MemoryOption = Annotated[str | None, typer.Option(help="Use no more than this: 24GB, 20GiB.")]
OutOption = Annotated[Path | None, typer.Option(help="The folder; default: a new one under runs/.")]
WithOption = Annotated[list[str] | None, typer.Option("--with", help="A method that must be in the result.")]
WithoutOption = Annotated[list[str] | None, typer.Option("--without", help="A method that must not be.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="As for train: --set training.epochs=1")]
StorageOption = Annotated[str | None, typer.Option(help="An Optuna storage URL; default: SQLite in the folder.")]
RetryOption = Annotated[bool, typer.Option("--retry", help="Try again the trials that failed before.")]


def run(
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
    """Find the batch size that gives the best result, then the cheapest methods for it; train, and report."""
    start(
        "all", recipe, model=model, data=data, machine=machine, budget=budget, price=price, memory=memory, out=out,
        wanted=wanted, unwanted=unwanted, settings=settings, storage=storage, retry=retry,
    )  # fmt: skip


def start(
    part: Any,
    recipe: Path | None,
    *,
    model: str | None,
    data: str | None,
    machine: str,
    budget: str | None,
    price: float | None,
    memory: str | None,
    out: Path | None,
    wanted: list[str] | None,
    unwanted: list[str] | None,
    settings: list[str] | None,
    storage: str | None,
    retry: bool,
) -> None:
    """Run a tuning, or one of its studies, as the command line asks."""
    if recipe is None and (model is None or data is None):
        raise InputError("Name a recipe file, or at least --model and --data. Example: tunewise tune recipe.yaml")

    from tunewise.lab.tuning import Options
    from tunewise.methods.reading import read_yaml, recipe_from_mapping, with_settings
    from tunewise.report.findings_file import REPORT_FILE
    from tunewise.report.findings_terminal import show_findings
    from tunewise.report.tuning_screen import TuningScreen
    from tunewise.tuning import Watch, new_folder, tune
    from tunewise.units import parse_budget, parse_bytes

    mapping: dict[str, Any] = read_yaml(recipe) if recipe is not None else {}
    named = [f"{key}={value}" for key, value in (("model.name", model), ("data.source", data)) if value is not None]
    mapping = with_settings(mapping, [*named, *(settings or [])])
    start_from = recipe_from_mapping(mapping, str(recipe) if recipe is not None else "command line")
    options = Options(
        budget_seconds=None if budget is None else parse_budget(budget, price),
        memory_bytes=None if memory is None else parse_bytes(memory),
        machine=machine,
        price_per_hour=price,
        wanted=tuple(wanted or ()),
        unwanted=tuple(unwanted or ()),
        storage=storage,
        retry_failed=retry,
    )
    folder = out or new_folder(recipe.stem if recipe is not None else "tuning")
    screen = TuningScreen()
    try:
        tuned = tune(start_from, folder, options, part=part, watch=Watch(screen.part, screen.trial, screen.training))
    except KeyboardInterrupt:
        screen.close()
        typer.echo(f"Stopped. Finished trials are kept; repeat the command with --out {folder} to go on.", err=True)
        raise typer.Exit(130) from None
    finally:
        screen.close()
    show_findings(tuned.findings, folder / REPORT_FILE)
    if tuned.training is not None:
        refuse_failed(tuned.training.quality, tuned.training.folder)
