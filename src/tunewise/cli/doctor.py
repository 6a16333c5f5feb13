"""`tunewise doctor DATA`: what is wrong with the data, and what the model would learn from it."""

from __future__ import annotations

from typing import Annotated

import typer


def run(
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, folder, hub data set id, or 'stdlib'.")],
    model: Annotated[str, typer.Option(help="The model whose tokenizer and template are used.")] = "embedded",
    settings: Annotated[list[str] | None, typer.Option("--set", help="As for train: --set data.format=alpaca")] = None,
    preview: Annotated[int, typer.Option(min=0, help="How many records to show with their supervised part.")] = 2,
) -> None:
    """Examine the data: format, template, supervision, lengths, duplicates, leaks, damage; show a coloured preview."""
    from tunewise.methods.defaults import choose_device, complete
    from tunewise.methods.reading import recipe_from_mapping, with_settings
    from tunewise.report.terminal import show_diagnosis, show_preview
    from tunewise.workload.model import context_length, load_config, load_tokenizer
    from tunewise.workload.prepare import diagnose

    recipe = recipe_from_mapping(with_settings({"model": model, "data": data}, settings or []), "command line")
    config = load_config(recipe.model)
    recipe = complete(recipe, config, choose_device(recipe.device))
    tokenizer = load_tokenizer(recipe.model)
    vocab_size = config.get_text_config().vocab_size
    found = diagnose(recipe, tokenizer, context_length(config), vocab_size)
    show_diagnosis(found.said, found.diagnosis)
    show_preview(found.train, tokenizer, preview)
    if found.diagnosis.errors:
        raise typer.Exit(2)
