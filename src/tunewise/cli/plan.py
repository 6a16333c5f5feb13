"""`tunewise plan MODEL`: which combination of methods is best on a machine, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunewise.errors import InputError

if TYPE_CHECKING:
    from tunewise.planner.plan import Plan


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
    quality: Annotated[str, typer.Option(help="How far from a plain run: exact, rounding, learning.")] = "learning",
    measure: Annotated[
        bool, typer.Option("--measure", help="Also time the recommended step here, on a few blocks.")
    ] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="As for train: --set batch.documents=32")] = None,
    explain: Annotated[str | None, typer.Option(metavar="METHOD", help="Show what one method changes here.")] = None,
    export: Annotated[
        str | None,
        typer.Option(metavar="TOOL", help="Also write it for trl, axolotl, llamafactory, torchtune or unsloth."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the recommended recipe here, for tunewise train.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict memory, time and cost of every combination of methods and choose the best, without weights or GPU."""
    from tunewise.methods.reading import recipe_to_yaml
    from tunewise.planner.case import Question
    from tunewise.planner.plan import answer, explain_method
    from tunewise.report import plan_table

    if out is not None and out.exists():
        raise InputError(f"--out: '{out}' exists already; name a new file.")
    question = Question(
        model, data, length, machine, memory, time, cost, price, tuple(wanted or ()), tuple(unwanted or ()), quality,
        documents, tuple(settings or ()), measure,
    )  # fmt: skip
    if export is not None:
        _refuse_early(export, explain, model, out)
    if explain is not None:
        explanation = explain_method(question, explain)
        if as_json:
            typer.echo(json.dumps(plan_table.explanation_to_mapping(explanation), indent=1))
        else:
            plan_table.show_explanation(explanation)
        return
    plan = answer(question)
    content = plan_table.plan_to_mapping(plan)
    if not as_json:
        plan_table.show_plan(plan)
    if out is not None:
        out.write_text(recipe_to_yaml(plan.recipe), encoding="utf-8")
        if not as_json:
            typer.echo(f"  wrote {out}; train with: tunewise train {out}")
    if export is not None:
        is_whole_run = data is not None or documents is not None or plan.recipe.training.steps is not None
        content["export"] = _export(plan, export, out, is_whole_run, as_json)
    if as_json:
        typer.echo(json.dumps(content, indent=1))


def _refuse_early(peer: str, explain: str | None, model: str, out: Path | None) -> None:
    """Say before planning what could not be written after it."""
    from tunewise.export.peers import file_name_of, known_peer, stem_of

    known_peer(peer)
    if explain is not None:
        raise InputError("--export writes the recommended recipe and --explain shows one method; ask for one of them.")
    file = file_name_of(stem_of(model), peer) if out is None else out.parent / file_name_of(out.stem, peer)
    if Path(file).exists():
        raise InputError(f"--export: '{file}' exists already; move it away, or give --out another name.")


def _export(plan: Plan, peer: str, out: Path | None, is_whole_run: bool, as_json: bool) -> dict[str, Any]:
    """Write the recommended recipe for another tool, beside `out`, and return what was written."""
    from tunewise.export.peers import facts_of, peer_config
    from tunewise.report.peer_config import peer_config_to_mapping, show_peer_config

    folder = Path() if out is None else out.parent
    config = peer_config(
        plan.recipe, peer, facts=facts_of(plan, is_whole_run), name=None if out is None else out.stem, folder=folder
    )
    file = config.write(folder)
    if not as_json:
        show_peer_config(config, file)
    return peer_config_to_mapping(config, file)
