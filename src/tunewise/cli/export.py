"""`tunewise export RUN --merged DIR`: one model out of base and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    merged: Annotated[Path, typer.Option(help="The new folder for the merged model (safetensors).")],
) -> None:
    """Merge a run's adapter into its base model, save it, read it again and compare."""
    from tunewise import api

    saved = api.export_merged(run_folder, merged)
    typer.echo(f"Merged model: {saved.folder} (read again, logits differ by at most {saved.max_difference:.1e})")
    typer.echo(f"  AutoModelForCausalLM.from_pretrained('{saved.folder}')")
