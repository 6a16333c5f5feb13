"""What a caller gets back from a finished training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunewise.engine.train import Outcome
from tunewise.export.finish import Saved
from tunewise.quality.verdict import QualityReport
from tunewise.recipe import Recipe


@dataclass(frozen=True)
class Result:
    """A finished training: the complete recipe, what came of it, where it lies, what was saved and whether it is good.

    `quality` is None where the recipe switches the gate off.
    """

    recipe: Recipe
    outcome: Outcome
    folder: Path
    saved: Saved
    quality: QualityReport | None = None
