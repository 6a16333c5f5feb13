"""Bytes and work of a combination as functions of the tokens in a micro-batch, from four shallow traces.

Two depths give the whole model (as `engine.extension` does), two sizes of micro-batch give every other one: at each
event of the step the bytes alive are affine in the number of tokens as long as the same operators run, which holds for
attention without a stored score matrix. So the peak of each place of the step is the maximum of a few lines, and these
are what is kept.

A *place* is named from its end of the model ("forward first+0", "backward last-1", "backward head"), so that
combinations that are traced at different depths can be compared place by place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from tunewise.engine.device_profile import DeviceProfile
from tunewise.engine.dry_run import BatchShape, TraceAll, TraceJob, one_by_one
from tunewise.engine.estimate import Trace
from tunewise.engine.extension import shallow, shallow_depths
from tunewise.engine.tracking import Curve, Kind, Place
from tunewise.engine.work import Work, WorkKey
from tunewise.planner import cache
from tunewise.planner.plain import WorkTable, work_from_plain, work_to_plain
from tunewise.recipe import Recipe
from tunewise.workload.model import random_model

Bytes = NDArray[np.float64]
"""One number a `Kind`."""

_GRID = np.geomspace(16, 2**21, 60)
"""Tokens at which lines are compared to leave out those that are never the highest."""


@dataclass(frozen=True, eq=False)
class Lines:
    """The peak of one place: the highest of lines `constant + slope * tokens`; arrays (lines, kinds)."""

    constant: Bytes
    slope: Bytes

    def at(self, tokens: float, gradients: float | None = None) -> Bytes:
        """Return the bytes by kind of the highest line.

        Args:
            tokens: positions in the micro-batch.
            gradients: bytes of all gradients where those of an earlier micro-batch are there already, else None.
        """
        values = self.constant + self.slope * tokens
        if gradients is not None:
            values[:, Kind.GRADIENTS] = gradients
        highest: Bytes = values[values.sum(axis=1).argmax()]
        return highest


@dataclass(frozen=True, eq=False)
class Footprint:
    """What a combination needs.

    Attributes:
        places: the peak of each place of the step.
        tokens: the two sizes of micro-batch that were traced.
        work: what one micro-batch and one update compute, at these two sizes.
        squares: sum of squares of the documents' lengths at these two sizes.
        trainable_parameters, total_parameters: of the whole model.
    """

    places: Mapping[str, Lines]
    tokens: tuple[int, int]
    work: tuple[WorkTable, WorkTable]
    squares: tuple[float, float]
    trainable_parameters: int
    total_parameters: int


def footprint(
    recipe: Recipe,
    config: PretrainedConfig,
    profile: DeviceProfile,
    shapes: tuple[BatchShape, ...],
    *,
    evaluates: bool = False,
    only_update: bool = False,
    trace_all: TraceAll = one_by_one,
) -> Footprint:
    """Trace `recipe` at one or two sizes of micro-batch, or take up what was traced before.

    One size is enough where only what does not depend on it is asked for (the optimizer's state), and no micro-batch
    at all is run with `only_update`. With `evaluates` an evaluation of the same micro-batch is traced too. Saving is
    seen on a CPU only: elsewhere it takes the host's memory.

    Raises:
        Conflict: the recipe's methods contradict each other or this model.
    """
    depths = shallow_depths(config, recipe)
    methods = recipe.to_mapping().get("methods")
    training = recipe.training.model_dump(include={"max_grad_norm", "weight_decay"})
    shape_numbers = [[shape.document_lengths, shape.num_supervised] for shape in shapes]
    key = cache.key_of(
        {"config": config.to_dict(), "methods": methods, "training": training, "shapes": shape_numbers}
        | {"profile": vars(profile), "device": recipe.device, "evaluates": evaluates, "only_update": only_update}
        | {"what": "footprint"}
    )
    known = cache.read(key)
    if known is not None:
        return _from_plain(known)
    models = [(config, recipe)] if depths is None else [shallow(config, recipe, kept) for kept in depths]
    jobs = [
        TraceJob(
            each, model, profile, () if only_update else (shape,), shape if evaluates else None,
            saves=profile.kind == "cpu",
        )
        for shape in shapes
        for model, each in models
    ]  # fmt: skip
    depth = int(config.get_text_config().num_hidden_layers)
    made = _to_plain(_through(shapes, trace_all(jobs), depth))
    cache.write(key, made)
    return _from_plain(made)  # also the first time, so that rounding is the same every time


def num_parameters(config: PretrainedConfig, recipe: Recipe) -> int:
    """Return how many parameters the base model has; made of fake tensors, in the two shallow depths."""

    def count(model_config: PretrainedConfig) -> int:
        with FakeTensorMode():
            return sum(p.numel() for p in random_model(model_config, torch.bfloat16, seed=0).parameters())

    plain = recipe.replace(methods=())
    depths = shallow_depths(config, plain)
    if depths is None:
        return count(config)
    small, large = (count(shallow(config, plain, kept)[0]) for kept in depths)
    depth = int(config.get_text_config().num_hidden_layers)
    return round(small + (large - small) * (depth - len(depths[0])) / (len(depths[1]) - len(depths[0])))


def _through(shapes: Sequence[BatchShape], traces: Sequence[Trace], depth: int) -> Footprint:
    """Return the footprint of `depth` blocks from the traces of one or two depths at each of the sizes."""
    per_size = len(traces) // len(shapes)
    seen: list[tuple[dict[str, Curve], WorkTable]] = []
    counts = (0, 0)
    for first in range(0, len(traces), per_size):
        small, large = traces[first], traces[first + per_size - 1]
        factor = 0.0 if per_size == 1 else (depth - small.num_blocks) / (large.num_blocks - small.num_blocks)
        seen.append((_curves(small, large, factor), _work(small, large, factor)))
        counts = tuple(  # type: ignore[assignment]
            round(few + (more - few) * factor)
            for few, more in (
                (small.trainable_parameters, large.trainable_parameters),
                (small.total_parameters, large.total_parameters),
            )
        )
    tokens = tuple(sum(map(sum, shape.document_lengths)) for shape in shapes)
    squares = tuple(float(sum(n * n for row in shape.document_lengths for n in row)) for shape in shapes)
    (curves, work), (second_curves, second_work) = seen[0], seen[-1]
    return Footprint(
        places={name: _lines(curves[name], second_curves[name], tokens) for name in curves if name in second_curves},
        tokens=(tokens[0], tokens[-1]),
        work=(work, second_work),
        squares=(squares[0], squares[-1]),
        trainable_parameters=counts[0],
        total_parameters=counts[1],
    )


def _curves(small: Trace, large: Trace, factor: float) -> dict[str, Curve]:
    """Return the full model's bytes at each event of each place."""
    curves: dict[str, Curve] = {}
    for place, curve in small.curves.items():
        for name, counterpart in _counterparts(place, small.num_blocks, large.num_blocks):
            other = large.curves.get(counterpart)
            if other is None:
                continue
            first = curve
            if len(first) != len(other):
                first, other = (each[[each.sum(axis=1).argmax()]] for each in (first, other))
            curves[name] = first + (other - first) * factor
    return curves


def _counterparts(place: Place, small: int, large: int) -> list[tuple[str, Place]]:
    """Return the names of a shallow model's place, each with the same place of the deeper one."""
    block = place.block
    if block is None or block < 0:
        return [(f"{place.moment} {'head' if block is None else 'front'}", place)]
    if small == large:
        return [(f"{place.moment} first+{block}", place)]
    names = []
    if block < small - 1:
        names.append((f"{place.moment} first+{block}", place))
    if block > 0:
        names.append((f"{place.moment} last-{small - 1 - block}", place._replace(block=block + large - small)))
    return names


def _work(small: Trace, large: Trace, factor: float) -> dict[WorkKey, Work]:
    zero = Work(0.0, 0.0, 0.0)
    work = {}
    for key in dict.fromkeys([*small.work, *large.work]):
        pair = zip(small.work.get(key, zero), large.work.get(key, zero), strict=True)
        work[key] = Work(*(first + (second - first) * factor for first, second in pair))
    return work


def _lines(first: Curve, second: Curve, tokens: Sequence[int]) -> Lines:
    """Return the lines through the events of two sizes of micro-batch that are the highest somewhere.

    Highest of all bytes, or of all but gradients: while micro-batches accumulate, all gradients are there anyway.
    """
    if len(first) != len(second):
        first, second = (each[[each.sum(axis=1).argmax()]] for each in (first, second))
    slope = (second - first) / max(1, tokens[-1] - tokens[0])
    constant = first - slope * tokens[0]
    others = [kind for kind in Kind if kind != Kind.GRADIENTS]
    highest: list[NDArray[np.int64]] = []
    for columns in (list(Kind), others):
        totals = constant[:, columns].sum(axis=1)[:, None] + slope[:, columns].sum(axis=1)[:, None] * _GRID
        highest.append(totals.argmax(axis=0))
    chosen = np.unique(np.concatenate(highest))
    return Lines(constant[chosen], slope[chosen])


def _to_plain(made: Footprint) -> dict[str, Any]:
    places = {
        name: [lines.constant.round().tolist(), lines.slope.round(4).tolist()] for name, lines in made.places.items()
    }
    return {
        "places": places,
        "tokens": made.tokens,
        "work": [work_to_plain(table) for table in made.work],
        "squares": made.squares,
        "parameters": [made.trainable_parameters, made.total_parameters],
    }


def _from_plain(plain: Mapping[str, Any]) -> Footprint:
    first, second = (work_from_plain(table) for table in plain["work"])
    return Footprint(
        places={name: Lines(np.array(c), np.array(s)) for name, (c, s) in plain["places"].items()},
        tokens=(plain["tokens"][0], plain["tokens"][1]),
        work=(first, second),
        squares=(plain["squares"][0], plain["squares"][1]),
        trainable_parameters=plain["parameters"][0],
        total_parameters=plain["parameters"][1],
    )
