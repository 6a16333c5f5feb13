"""After training, without training: how far to go from the base towards what was trained.

    W(a) = W_0 + a (W_1 - W_0)      a = 0 the base, 1 what was trained, in between less of both gain and forgetting

For LoRA this is a factor on its scale (LM-Cocktail, Xiao et al. 2023, arXiv 2311.13534); for weights that were trained
themselves it is WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903). A sweep costs two evaluations a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunewise.engine.evaluate import validation_loss
from tunewise.errors import Conflict
from tunewise.layers.lora import LoRALinear, is_plain, lora_layers
from tunewise.methods.lora import LoRA
from tunewise.methods.method import Run
from tunewise.methods.peft import Peft
from tunewise.workload.corpus import Corpus

FACTORS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25)
"""What a sweep tries when nobody says otherwise."""


@dataclass(frozen=True)
class ScalePoint:
    """One factor, and the two losses at it, in nats per supervised token."""

    factor: float
    task_loss: float
    general_loss: float


class WeightLine:
    """The straight line from a run's base through what it trained; made before the trained values are put in."""

    def __init__(self, run: Run) -> None:
        """Remember where `run`, freshly built, starts.

        Raises:
            Conflict: its adapter has no such line in the weights.
        """
        if run.recipe.get(Peft) is not None:
            raise Conflict("Scaling moves along the weights, and an adapter of peft's may have none. Use lora.")
        layers = lora_layers(run.model)
        if not all(is_plain(layer) for layer in layers.values()):
            raise Conflict(
                "Scaling needs an update of the weights that its scale multiplies, which lora has. Use lora."
            )
        lora = run.recipe.get(LoRA)
        if lora is not None and lora.init in ("pissa", "loftq"):
            raise Conflict("PiSSA's and LoftQ's factors hold a part of the base: their scale is no line to it.")
        self._scales: dict[LoRALinear, float] = {layer: layer.scale for layer in layers.values()}
        factors = {id(factor.weight) for layer in layers.values() for factor in (layer.lora_A, layer.lora_B)}
        self._start: dict[nn.Parameter, Tensor] = {
            parameter: parameter.detach().clone() for _, parameter in run.trainable() if id(parameter) not in factors
        }
        self._end: dict[nn.Parameter, Tensor] = {}

    def reached(self) -> None:
        """Remember where the run is now, with its trained values: factor 1."""
        self._end = {parameter: parameter.detach().clone() for parameter in self._start}

    @torch.no_grad()
    def move_to(self, factor: float) -> None:
        """Put the weights at `factor`; 0 and 1 give exactly the base and exactly what was trained."""
        for layer, scale in self._scales.items():
            layer.scale = factor * scale
        for parameter, start in self._start.items():
            end = self._end[parameter]
            parameter.copy_(end if factor == 1.0 else start + factor * (end - start))


def sweep(
    run: Run,
    line: WeightLine,
    factors: Sequence[float],
    task: Corpus,
    general: Corpus,
    max_documents: int,
) -> tuple[ScalePoint, ...]:
    """Return task and general loss at each factor; the run is at factor 1 afterwards.

    Args:
        run: with its trained values.
        line: of this run.
        factors: where to look.
        task: validation documents of the new task, the first `max_documents` of them.
        general: the general text.
        max_documents: see there.
    """
    points = []
    documents = range(min(len(task), max_documents))
    try:
        for factor in factors:
            line.move_to(factor)
            on_task = validation_loss(run, task, documents, run.layout)
            on_general = validation_loss(run, general, range(len(general)), run.layout)
            assert on_task is not None
            assert on_general is not None
            points.append(ScalePoint(factor, on_task, on_general))
    finally:
        line.move_to(1.0)
    return tuple(points)


def best_within(points: Sequence[ScalePoint], budget: float | None) -> ScalePoint | None:
    """Return the point of lowest task loss whose forgetting is at most `budget`, or None when no factor above 0 is.

    Forgetting is the general loss above that at factor 0, the base, which must be among the points.
    """
    base = next(point for point in points if point.factor == 0.0)
    allowed = [
        point
        for point in points
        if point.factor > 0.0 and (budget is None or point.general_loss - base.general_loss <= budget)
    ]
    return min(allowed, key=lambda point: point.task_loss, default=None)
