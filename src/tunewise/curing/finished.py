"""A finished run read from its folder, as the training that made it returned it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunewise.engine.run_folder import RunFolder, read_metrics
from tunewise.engine.train import Outcome
from tunewise.evaluation import read_report
from tunewise.export.finish import Saved
from tunewise.export.result import Result
from tunewise.methods.reading import load_recipe


def finished_result(folder: Path) -> Result | None:
    """Return the result of a run that came to its end, None where it did not, or where its result is not there."""
    home = RunFolder(folder)
    metrics = folder / "metrics.jsonl"
    if not home.recipe_file.is_file() or not metrics.is_file() or not metrics.read_bytes().endswith(b"\n"):
        return None  # the last line is half: it was killed
    last: dict[str, dict[str, Any]] = {entry["event"]: entry for entry in read_metrics(metrics)}
    recipe = load_recipe(home.recipe_file)
    if "finished" not in last or "saved" not in last:
        return None
    report = read_report(folder)
    place = folder / Path(last["saved"]["path"]).name  # the folder may have been moved since
    if not place.is_dir() or (report is None and recipe.quality.gate):
        return None
    outcome = Outcome(**{name: last["finished"][name] for name in Outcome.__dataclass_fields__})
    saved = Saved(last["saved"]["kind"], place, last["saved"]["max_difference"])
    return Result(recipe, outcome, folder, saved, report)
