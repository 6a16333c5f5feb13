"""An export to another trainer for people and for `--json`: where it is, how to run it, what it cannot say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tunewise.export.peers import PEERS, PeerConfig


def show_peer_config(config: PeerConfig, file: Path, console: Console | None = None) -> None:
    """Print what was written to `file`."""
    console = console or Console(highlight=False)
    tool = PEERS[config.peer].name
    others = "".join(f" and {file.parent / name}" for name, _ in config.companions)
    console.print(f"  wrote {escape(str(file))}{escape(others)} for {tool}; run it with:", soft_wrap=True)
    for line in config.command.splitlines():
        console.print(f"    {escape(line)}", soft_wrap=True)
    if config.not_expressible:
        console.print(f"  settings that {tool} cannot honour as they stand ({len(config.not_expressible)}):")
    for missing in config.not_expressible:
        console.print(f"    {escape(str(missing))}", soft_wrap=True)
    for note in config.notes:
        console.print(f"  [dim]also different: {escape(note)}[/]", soft_wrap=True)


def peer_config_to_mapping(config: PeerConfig, file: Path) -> dict[str, Any]:
    """Return an export as plain data for `--json`."""
    return {
        "tool": config.peer,
        "files": [str(file), *(str(file.parent / name) for name, _ in config.companions)],
        "command": config.command,
        "mapped": dict(config.mapped),
        "not_expressible": [dataclasses.asdict(missing) for missing in config.not_expressible],
        "notes": list(config.notes),
    }
