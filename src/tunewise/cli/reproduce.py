"""`tunewise reproduce NAME ...`: a published result beside ours, measured here and now."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewise.errors import InputError, Interrupted, did_you_mean

if TYPE_CHECKING:
    from tunewise.reproduce.keeping import Keeper
    from tunewise.reproduce.reproduction import Reproduction, Result


def run(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Which; without a name they are listed.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them, one after another.")] = False,
    short: Annotated[bool, typer.Option("--short", help="Fewer seeds and steps: all in less than an hour.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write all results here.")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Say what there is, and do nothing.")] = False,
    shared: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Data sets that do not come along; default ../shared/data.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where finished results are kept.")] = Path("runs/reproduce"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="So many at once, each with its share of the cores; default one a core.")
    ] = None,
) -> None:
    """Repeat published experiments at this machine's scale: paper, ours, ratio or direction, interval, verdict.

    Finished ones are kept and found again; a call that was stopped goes on with the same command. Nothing is
    downloaded.
    """
    from tunewise.engine.run_folder import write_whole
    from tunewise.report import reproductions as shown
    from tunewise.reproduce import ALL, BY_NAME
    from tunewise.reproduce.bench import Size
    from tunewise.reproduce.keeping import Keeper, combined
    from tunewise.reproduce.side_by_side import default_jobs, side_by_side

    if only_list or not (names or every):
        for reproduction in ALL:
            typer.echo(f"{reproduction.name:24} {reproduction.title}")
        return
    for name in names or ():
        if name not in BY_NAME:
            raise InputError(f"There is no reproduction '{name}'.{did_you_mean(name, BY_NAME)}")
    place = shared if shared is not None else _beside()
    if shared is not None and not shared.is_dir():
        raise InputError(f"--shared: there is no folder '{shared}'.")
    wanted = ALL if every else tuple(BY_NAME[name] for name in dict.fromkeys(names or ()))
    size = Size.SHORT if short else Size.FULL

    def say(line: str) -> None:
        typer.echo(f"    {line}", err=True)

    keeper = Keeper(out, size, place, say)
    results, failed = [], []
    new = [reproduction.name for reproduction in wanted if keeper.kept(reproduction) is None]
    at_once = min(jobs or default_jobs(), len(new))
    options = [*(["--short"] if short else []), "--out", str(out), *(["--shared", str(place)] if place else [])]
    with side_by_side(new, at_once, options, say) if at_once > 1 else nullcontext(lambda name: True) as ended_well:
        for number, reproduction in enumerate(wanted, start=1):
            typer.echo(f"[{number}/{len(wanted)}] {reproduction.name}: {reproduction.title}", err=True)
            result = _result(reproduction, keeper) if ended_well(reproduction.name) else None
            if result is None:
                failed.append(reproduction.name)
                continue
            results.append(result)
            typer.echo(shown.terminal(result))
            if as_json is not None:
                as_json.parent.mkdir(parents=True, exist_ok=True)
                write_whole(as_json, json.dumps(combined(results, failed), indent=1) + "\n")
    if len(wanted) > 1:
        typer.echo(shown.overview(results))
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _result(reproduction: Reproduction, keeper: Keeper) -> Result | None:
    """Return the result, or say why there is none and return None."""
    try:
        return keeper.result(reproduction)
    except Interrupted:
        raise
    except Exception as error:  # the others are not to blame; it is reported, and tried again by the next call
        keeper.say(f"failed: {type(error).__name__}: {error}")
        return None


def _beside() -> Path | None:
    """Return the shared data beside or above the present folder, where there are any."""
    here = Path.cwd().resolve()
    places = (folder / "shared" / "data" for folder in (here, *here.parents))
    return next((place for place in places if place.is_dir()), None)
