"""The command line. One file a command; nothing heavy is imported until a command runs."""

from __future__ import annotations

import sys

import typer

from tunewise.cli import doctor, evaluate, export, machine, plan, report, reproduce, scale, study, train, tune
from tunewise.errors import Interrupted, TunewiseError

app = typer.Typer(
    name="tunewise",
    help="Find the cheapest way to fine-tune or train a language model well, prove it by experiment, and do it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (tune, train, evaluate, plan, report, doctor, export, scale, machine, reproduce):
    app.command(name=command.__name__.rsplit(".", 1)[1])(command.run)
app.add_typer(study.app, name="study")


def main() -> None:
    """Run a command; an error that is the user's to mend is printed without traceback, with its exit code."""
    try:
        app()
    except TunewiseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except PermissionError as error:  # a file that may not be read can turn up anywhere
        print(f"error: {error.filename}: {error.strerror}. Check its permissions.", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
