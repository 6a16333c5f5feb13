"""`tunewise train`: one command from a recipe (or just a model and data) to a verified adapter or model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunewise.errors import GateFailed, InputError

if TYPE_CHECKING:
    from tunewise.quality.verdict import QualityReport


def run(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe in YAML; it needs no more than model and data.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or 'embedded'.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder, hub data set id, or 'stdlib'.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; default: a new one under runs/.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one field: --set training.learning_rate=1e-4")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this interrupted run, bit for bit.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of text.")] = False,
) -> None:
    """Fine-tune or train a model as a recipe says, and save a verified adapter or model."""
    if resume is not None and any(option is not None for option in (recipe, model, data, out, settings)):
        raise InputError("--resume goes on with the run as it was started; it takes no recipe and no other settings.")
    if resume is None and recipe is None and (model is None or data is None):
        raise InputError("Name a recipe file, or at least --model and --data. Example: tunewise train recipe.yaml")

    from tunewise import api
    from tunewise.methods.reading import read_yaml, recipe_from_mapping, with_settings
    from tunewise.report.terminal import JsonLines, Terminal

    screen = JsonLines() if json_lines else Terminal()
    if resume is not None:
        result = api.resume(resume, observe=screen.observe, announce=screen.announce)
        screen.finish(result)
        refuse_failed(result.quality, result.folder)
        return
    mapping: dict[str, Any] = read_yaml(recipe) if recipe is not None else {}
    named = [f"{key}={value}" for key, value in (("model.name", model), ("data.source", data)) if value is not None]
    mapping = with_settings(mapping, [*named, *(settings or [])])
    source = str(recipe) if recipe is not None else "command line"
    result = api.train(recipe_from_mapping(mapping, source), out=out, observe=screen.observe, announce=screen.announce)
    screen.finish(result)
    refuse_failed(result.quality, result.folder)


def refuse_failed(report: QualityReport | None, folder: Path) -> None:
    """Leave with the gate's exit code and its reasons when it refused the model.

    Raises:
        GateFailed: it did.
    """
    if report is not None and not report.passed:
        reasons = "\n  ".join(report.reasons)
        raise GateFailed(
            f"the quality gate refuses this model:\n  {reasons}\n"
            f"It is kept in {folder}, marked. The thresholds are the recipe's section 'quality'; see docs/quality.md."
        )
