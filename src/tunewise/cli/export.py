"""`tunewise export RUN --merged DIR`: one model out of base and adapter. `--rank R`: one rank of a DyLoRA run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunewise.errors import InputError


def run(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    merged: Annotated[Path | None, typer.Option(help="The new folder for the merged model (safetensors).")] = None,
    rank: Annotated[int | None, typer.Option(help="Of what 'dylora' trained, how many ranks.")] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="With --rank: a new folder for the adapter. [default: RUN/adapter-rank-R]"),
    ] = None,
) -> None:
    """Merge a run's adapter into its base model, or cut it to a rank; save, read again and compare."""
    if merged is None and rank is None:
        raise InputError("export: say what to make: --merged DIR, or for a run of 'dylora' --rank R.")
    if adapter is not None and (rank is None or merged is not None):
        raise InputError("export: --adapter DIR is where --rank R goes without --merged; a run's own adapter is in it.")
    from tunewise import api

    if merged is not None:
        saved = api.export_merged(run_folder, merged, rank=rank)
        typer.echo(f"Merged model: {saved.folder} (read again, logits differ by at most {saved.max_difference:.1e})")
        typer.echo(f"  AutoModelForCausalLM.from_pretrained('{saved.folder}')")
    elif rank is not None:
        saved = api.export_rank(run_folder, rank, adapter)
        typer.echo(f"Adapter of rank {rank}: {saved.folder} (read again, same logits)")
        typer.echo(f"  PeftModel.from_pretrained(base, '{saved.folder}')")
