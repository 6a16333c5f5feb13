"""`tunewise plan MODEL`: which combination of methods is best on a machine, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tunewise.errors import InputError


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, config.json, or 'embedded'.")],
    data: Annotated[str | None, typer.Option(help="File, folder, hub data set id, or 'stdlib'.")] = None,
    length: Annotated[int | None, typer.Option(help="Instead of data: documents of so many tokens.")] = None,
    documents: Annotated[int | None, typer.Option(help="How many documents of --length there are.")] = None,
    machine: Annotated[str, typer.Option(help="A known accelerator, a machine's YAML file, or 'here'.")] = "here",
    memory: Annotated[str | None, typer.Option(help="Use no more than this: 24GB, 20GiB.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit of the whole run: 2h, 30m.")] = None,
    cost: Annotated[float | None, typer.Option(help="Limit of the whole run, in the currency of --price.")] = None,
    price: Annotated[float | None, typer.Option(help="Price of the machine per hour.")] = None,
    wanted: Annotated[list[str] | None, typer.Option("--with", help="A method that must be in the recipe.")] = None,
    unwanted: Annotated[list[str] | None, typer.Option("--without", help="A method that must not be.")] = None,
    quality: Annotated[str, typer.Option(help="exact, rounding or learning: how far from a plain run.")] = "learning",
    settings: Annotated[list[str] | None, typer.Option("--set", help="As for train: --set batch.documents=32")] = None,
    explain: Annotated[str | None, typer.Option(metavar="METHOD", help="Show what one method changes here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the recommended recipe here, for tunewise train.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict memory, time and cost of every combination of methods and choose the best, without weights or GPU."""
    import yaml

    from tunewise.planner.case import Question
    from tunewise.planner.plan import answer, explain_method
    from tunewise.report import plan_table

    if out is not None and out.exists():
        raise InputError(f"--out: '{out}' exists already; name a new file.")
    question = Question(
        model, data, length, machine, memory, time, cost, price, tuple(wanted or ()), tuple(unwanted or ()), quality,
        documents, tuple(settings or ()),
    )  # fmt: skip
    if explain is not None:
        explanation = explain_method(question, explain)
        if as_json:
            typer.echo(json.dumps(plan_table.explanation_to_mapping(explanation), indent=1))
        else:
            plan_table.show_explanation(explanation)
        return
    plan = answer(question)
    if as_json:
        typer.echo(json.dumps(plan_table.plan_to_mapping(plan), indent=1))
    else:
        plan_table.show_plan(plan)
    if out is not None:
        text = yaml.safe_dump(plan.recipe.to_mapping(), sort_keys=False, allow_unicode=True)
        out.write_text(text, encoding="utf-8")
        if not as_json:
            typer.echo(f"  wrote {out}; train with: tunewise train {out}")
