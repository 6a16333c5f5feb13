"""`tunewise export RUN`: one model out of base and adapter, or the result again: cut to a rank, scaled, averaged."""

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
        typer.Option(help="With --rank, --scale or an average: a new folder. [default: RUN/adapter-rank-R]"),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on what was trained; `tunewise scale` finds one.")] = 1.0,
    average_last: Annotated[int, typer.Option(min=1, help="Average so many of the newest checkpoints.")] = 1,
    average_with: Annotated[list[Path] | None, typer.Option(help="Average with this run of the same base.")] = None,
) -> None:
    """Save a run's result again: merged into the base, cut to a rank, scaled, averaged; read again and compared."""
    others = tuple(average_with or ())
    is_changed = scale != 1.0 or average_last > 1 or bool(others)
    if merged is None and rank is None and not is_changed:
        if adapter is not None:
            raise InputError(
                "export: --adapter DIR is where --rank R goes without --merged, or what --scale and averages make; a "
                "run's own adapter is in it."
            )
        raise InputError("export: say what to make: --merged DIR, or for a run of 'dylora' --rank R.")
    if adapter is not None and merged is not None:
        raise InputError("export: --adapter DIR is where --rank R goes without --merged; name one of the two.")
    if rank is not None and is_changed:
        raise InputError("export: --rank cuts what 'dylora' trained; it does not go with --scale or an average.")
    if merged is None and rank is None and adapter is None:
        raise InputError("export: name a new folder: --adapter DIR, or --merged DIR for one model.")
    from tunewise import api

    if merged is not None:
        saved = api.export_merged(run_folder, merged, rank=rank, scale=scale, last=average_last, others=others)
        typer.echo(f"Merged model: {saved.folder} (read again, logits differ by at most {saved.max_difference:.1e})")
        typer.echo(f"  AutoModelForCausalLM.from_pretrained('{saved.folder}')")
    elif rank is not None:
        saved = api.export_rank(run_folder, rank, adapter)
        typer.echo(f"Adapter of rank {rank}: {saved.folder} (read again, same logits)")
        typer.echo(f"  PeftModel.from_pretrained(base, '{saved.folder}')")
    elif adapter is not None:
        saved, lost = api.export_adapter(run_folder, adapter, scale=scale, last=average_last, others=others)
        typer.echo(f"Saved and read again: {saved.folder}")
        if lost > 0:
            typer.echo(f"The adapter's rank holds all but {lost:.1%} of the average's change.")
