"""What is tried: a `Trial`, a frozen value whose key is the hash of everything its outcome depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import QualitySpec, Recipe, Value

Task = Literal["learn", "measure", "throughput", "cure"]


class Trial(Value):
    """One recipe with a question.

    Attributes:
        task: "learn" trains to the recipe's end and takes the validation loss; "measure" takes memory, speed and the
            first batch's numbers in a few steps; "throughput" times micro-batches of growing size; "cure" mends a
            model that the gate refused, and judges it.
        recipe: complete, as plain data (`Recipe.to_mapping`).
        evaluations: how often a "learn" trial takes the validation loss, its end included.
        measures_noise: whether a "learn" trial measures the gradient's noise.
        noise_examples: global batches whose documents give their gradients one by one, at the end.
        warm_up, steps: of a "measure" trial.
        largest: of a "throughput" trial: rows of the largest micro-batch.
        measures_forgetting: whether the loss on general text is taken before the first step and after the last.
        repeat: which repetition of the same question this is, from 0.
        cure: of a "cure" trial: its name.
    """

    task: Task
    recipe: dict[str, Any]
    evaluations: int = 1
    measures_noise: bool = False
    noise_examples: int = 0
    warm_up: int = 1
    steps: int = 3
    largest: int = 1
    measures_forgetting: bool = False
    repeat: int = 0
    cure: str = ""

    @staticmethod
    def of(task: Task, recipe: Recipe, **options: Any) -> Trial:
        """Return a trial of `recipe`; where its results are put does not belong to it, how they are judged to cures."""
        quality = recipe.quality if task == "cure" else QualitySpec()
        mapping = recipe.replace(out=None, report_to=(), quality=quality).to_mapping()
        return Trial(task=task, recipe=mapping, **options)

    def read_recipe(self) -> Recipe:
        """Return the recipe."""
        return recipe_from_mapping(self.recipe, "the trial's recipe")

    def key(self, circumstances: dict[str, Any]) -> str:
        """Return 16 hexadecimal digits, equal exactly for equal trials under equal circumstances.

        Args:
            circumstances: plain data: data and model fingerprints, machine, versions, memory limit.
        """
        content = json.dumps([self.model_dump(mode="json"), circumstances], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]
