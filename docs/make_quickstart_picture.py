"""Run the quickstart and keep what it prints as a picture for the README.

python docs/make_quickstart_picture.py        # about three minutes on two cores
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from rich.console import Console

from tunewise import api
from tunewise.report.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "quickstart.svg"


def main() -> None:
    console = Console(record=True, width=118, file=io.StringIO(), highlight=False)
    console.print("[bold]$ tunewise train examples/quickstart.yaml[/]")
    screen = Terminal(console)
    with tempfile.TemporaryDirectory() as folder:
        result = api.train(
            ROOT / "examples" / "quickstart.yaml",
            out=Path(folder) / "quickstart",
            observe=screen.observe,
            announce=screen.announce,
        )
        screen.finish(result)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(console.export_svg(title="tunewise"), encoding="utf-8")


if __name__ == "__main__":
    main()
