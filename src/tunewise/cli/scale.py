"""`tunewise scale RUN`: how much of what was trained to keep; two evaluations a factor, no training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tunewise.errors import InputError


def run(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    general_text: Annotated[
        str | None, typer.Option(help="What forgetting is measured on: a file, or 'default'; else the recipe's.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.0, help="Forgetting allowed, nats per token; else the recipe's.")
    ] = None,
    factors: Annotated[str | None, typer.Option(help="Factors to try, such as 0.5,0.75,1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a run at several factors of its change: task loss and forgetting; name the best within the budget."""
    from tunewise import api
    from tunewise.engine.scaling import FACTORS

    found = api.sweep_scale(
        run_folder, factors=_numbers(factors) if factors else FACTORS, general_text=general_text, budget=budget
    )
    base, best = found.base, found.best
    if as_json:
        content = {"points": [asdict(p) for p in found.points], "budget": found.budget, "best": best and asdict(best)}
        typer.echo(json.dumps(content))
        return
    typer.echo("factor  task loss  forgetting   (nats per supervised token; 0 is the base, 1 what was trained)")
    for point in found.points:
        mark = "  <- lowest task loss" + (" within the budget" if found.budget is not None else "")
        forgetting = point.general_loss - base.general_loss
        is_best = best is not None and point.factor == best.factor
        typer.echo(f"{point.factor:>6g}  {point.task_loss:>9.4f}  {forgetting:>+10.4f}{mark if is_best else ''}")
    if best is None:
        typer.echo(f"No factor forgets less than the budget of {found.budget:g}; try smaller ones with --factors.")
    elif best.factor != 1.0:
        typer.echo(f"tunewise export {run_folder} --adapter DIR --scale {best.factor:g}")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--factors: '{text}' is no list of numbers; write for example 0.5,0.75,1.") from None
    if any(not 0.0 <= factor <= 4.0 for factor in found):
        raise InputError("--factors: factors go from 0 (the base) over 1 (what was trained) to 4 at most.")
    return found
