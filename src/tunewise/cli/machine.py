"""`tunewise machine`: what this machine can do, measured; or the catalogue of known ones."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def run(
    list_all: Annotated[bool, typer.Option("--list", help="List the catalogue instead of measuring.")] = False,
    price: Annotated[float | None, typer.Option(help="Price of this machine per hour, for costs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure this machine (matmul rates, bandwidth, launch overhead), or list the known accelerators."""
    from tunewise.machine.catalogue import CATALOGUE
    from tunewise.machine.probe import measure_machine
    from tunewise.report.terminal import show_machines

    machines = list(CATALOGUE) if list_all else [measure_machine(price_per_hour=price)]
    if as_json:
        typer.echo(json.dumps([machine.model_dump(mode="json") for machine in machines], indent=1))
    else:
        show_machines(machines)
