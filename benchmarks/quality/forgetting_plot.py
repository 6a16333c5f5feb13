"""Draw what `forgetting.py` has measured, with the published direction beside each figure, for docs/forgetting.md.

    python benchmarks/quality/forgetting_plot.py benchmarks/results/cpu-2core/forgetting.json --out docs/pictures

Two figures a world: every arm by what it forgot and gained, and the sweep of the factor from the base to beyond what
was trained. Nothing is measured here; the same JSON gives the same pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tunewise.report.charts.svg import Entry, Mark, Plot, Series, draw

HERE = {True: "here: as published", False: "here: not so", None: "here: cannot be told yet"}


def arms_plot(world: str, figures: dict[str, Any]) -> Plot:
    """Gain against forgetting of every arm, means over seeds with the deviation between them."""
    marks, legend = [], []
    for number, (name, arm) in enumerate(figures["arms"].items(), 1):
        gain, lost = arm["gain"], arm["forgetting"]
        marks.append(Mark(lost["mean"], gain["mean"], str(number), lost["deviation"] or 0.0, gain["deviation"] or 0.0))
        legend.append(Entry(f"{number}  {name}: {_shares(arm)}", (arm["published"], HERE[arm["agrees"]])))
    series = [Series("arms", tuple(marks))]
    if (average := figures.get("average")) is not None:
        series.append(Series("average", (Mark(average["forgetting"], average["gain"], "a"),)))
        said = (average["published"], HERE[average["agrees"]])
        legend.append(Entry("a  average of the seeds", said, colour=1))
    seeds = max(arm["gain"]["seeds"] for arm in figures["arms"].values())
    title = f"{world}: what each cure keeps and saves ({seeds} seed{'s' if seeds > 1 else ''})"
    return Plot(title, "forgetting, nats a token", "gain, nats a token", tuple(series), tuple(legend))


def sweep_plot(world: str, figures: dict[str, Any]) -> Plot | None:
    """Gain and forgetting by the factor of the change; None where no sweep was made."""
    found = figures.get("scaling")
    if found is None:
        return None
    gains = [found["task"][0] - loss for loss in found["task"]]
    lost = [loss - found["general"][0] for loss in found["general"]]
    series = tuple(
        Series(name, tuple(Mark(x, y) for x, y in zip(found["factors"], values, strict=True)), is_line=True)
        for name, values in (("gain", gains), ("forgetting", lost))
    )
    shares = [
        f"at {factor}: {share['gain_kept']:.0%} of the gain kept, {share['removed']:.0%} of the forgetting avoided"
        for factor, share in found["shares"].items()
    ]
    convex = [f"{name} loss: {'convex' if is_so else 'not convex'}" for name, is_so in found["convex"].items()]
    legend = (
        Entry("gain: fall of the task's loss", (), 0),
        Entry("forgetting: rise of the general loss", (), 1),
        Entry(found["published"], (HERE[found["agrees"]], *convex, *shares)),
    )
    title = f"{world}: from the base (0) to what was trained (1), and beyond"
    return Plot(title, "factor of the change", "nats a token", series, legend)


def _shares(arm: dict[str, Any]) -> str:
    if "removed" not in arm:
        return "what the others are held against"
    return f"{arm['gain_kept']['mean']:.0%} of the gain kept, {arm['removed']['mean']:.0%} of the forgetting removed"


def write(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Write the figures of all worlds and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for world, figures in summary.items():
        for kind, plot in (("arms", arms_plot(world, figures)), ("sweep", sweep_plot(world, figures))):
            if plot is not None:
                files.append(folder / f"forgetting-{world.replace(', ', '-').replace(' ', '-')}-{kind}.svg")
                files[-1].write_text(draw(plot), encoding="utf-8")
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what forgetting.py wrote")
    parser.add_argument("--out", type=Path, default=Path("docs") / "pictures")
    arguments = parser.parse_args()
    if not arguments.json.is_file():
        print(f"there is no {arguments.json}; run forgetting.py --json {arguments.json} first", file=sys.stderr)
        return 2
    for file in write(json.loads(arguments.json.read_text(encoding="utf-8"))["summary"], arguments.out):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
