"""The recommended step, timed on this machine before anybody trains: on shallow copies of the model, extended in depth.

A roofline knows ceilings, not caches, fresh pages or kernels that fit a shape badly. What a step really takes is known
to who runs it. All blocks of a kind take equally long, so the engine's own step on two models of few blocks, with
random weights of the true shapes and rows of the true lengths, gives the step of the whole model. Both are timed in
turns, so that a machine that slows down slows down both.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PretrainedConfig

from tunewise.engine.build import build
from tunewise.engine.extension import shallow, shallow_depths
from tunewise.engine.step import (
    begin_step,
    clipped_norm,
    gradients,
    parameter_groups,
    set_learning_rate,
    update,
    update_in_backward,
)
from tunewise.errors import InputError
from tunewise.methods.precision import Precision
from tunewise.planner.calibration import is_here, record_measurement
from tunewise.planner.case import Case
from tunewise.planner.choose import Selection
from tunewise.planner.load import Load
from tunewise.planner.predict import Interval, Predictor, kind_of
from tunewise.planner.search import search
from tunewise.recipe import Recipe
from tunewise.workload.batches import Layout, MicroBatch
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import random_model

APART = 4
"""Periods of blocks between the two models, where there are so many: farther apart, less of it is noise."""

MOST_MICRO_BATCHES = 4
"""Of a step with more, so many are timed, short and long ones alike."""

WARM_UP, FEWEST_ROUNDS, MOST_ROUNDS = 2, 4, 12

ENOUGH_SECONDS = 4.0
"""Rounds are repeated for about this long, at least FEWEST_ROUNDS times."""

OFF_BY = (0.79, 1.42)
"""Measured over rehearsed time: the range of 14 trainings on two cores (benchmarks/estimate/time_cpu.py)."""


MOST_REHEARSED = 3
"""So many recommendations are timed: each may change what the next one is."""


@dataclass(frozen=True)
class Rehearsal:
    """What a step takes here.

    Attributes:
        step_seconds: of a global step of the whole model.
        blocks: of each model that was timed; one number where the whole model was.
        rounds: how often each was timed.
    """

    step_seconds: Interval
    blocks: tuple[int, ...]
    rounds: int

    @property
    def reason(self) -> str:
        """Where the interval is from."""
        models = " and ".join(f"{count}" for count in self.blocks)
        what = f"copies of {models} blocks" if len(self.blocks) > 1 else "the whole model"
        return f"the step itself, timed {self.rounds} times here on {what} with random weights"


def rehearse(recipe: Recipe, config: PretrainedConfig, load: Load) -> Rehearsal:
    """Time the step of `recipe` on the device that it names.

    Args:
        recipe: a complete recipe; `recipe.device` is a device of this machine.
        config: of the whole model.
        load: the documents of the run.

    Raises:
        Conflict: the recipe's methods contradict each other or this model.
    """
    depth = int(config.get_text_config().num_hidden_layers)
    pairs = (shallow_depths(config, recipe, apart) for apart in range(APART, 0, -1))
    kept = next((pair for pair in pairs if pair is not None), None)
    models = [(config, recipe)] if kept is None else [shallow(config, recipe, blocks) for blocks in kept]
    blocks = (depth,) if kept is None else tuple(map(len, kept))
    timed = [_Timed(changed, each, load) for each, changed in models]
    factor = 0.0 if kept is None else (depth - blocks[0]) / (blocks[1] - blocks[0])
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < WARM_UP + FEWEST_ROUNDS or (
        time.perf_counter() - started < ENOUGH_SECONDS and len(seconds) < WARM_UP + MOST_ROUNDS
    ):
        taken = [each.step() for each in timed]
        seconds.append(taken[0] + (taken[-1] - taken[0]) * factor)
    del timed
    gc.collect()
    rounds = seconds[WARM_UP:]
    middle = statistics.median(rounds)
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Rehearsal(Interval(middle, low * OFF_BY[0], high * OFF_BY[1]), blocks, len(rounds))


def rehearsed(case: Case, predictor: Predictor, selection: Selection) -> Selection:
    """Return the selection with its recommendation timed here; what is measured corrects the others, and may change it.

    The ratios of measured and predicted time are kept in the calibration file, so the next plan knows them as well.

    Raises:
        InputError: the plan is for another machine.
    """
    if not is_here(case.machine.name):
        raise InputError(
            f"--measure times steps on this machine, but the plan is for {case.machine.name}. Plan for --machine here, "
            "or leave --measure out."
        )
    known: dict[str, Rehearsal] = {}
    while selection.best is not None and len(known) < MOST_REHEARSED:
        recipe = case.recipe(selection.best)
        if recipe.id in known:
            break
        known[recipe.id] = found = rehearse(recipe, case.config, case.load)
        record_measurement(
            case.machine.name, kind_of(recipe), found.step_seconds.middle, selection.best.roofline_seconds
        )
        selection = search(case, predictor)
    best = selection.best
    timed = None if best is None else known.get(case.recipe(best).id)
    if best is None or timed is None:
        return selection
    seconds, tokens = timed.step_seconds, case.load.tokens_per_step
    better = replace(
        best,
        step_seconds=seconds,
        tokens_per_second=Interval(tokens / seconds.middle, tokens / seconds.high, tokens / seconds.low),
        reason_of_interval=timed.reason,
    )
    front = tuple(better if each is best else each for each in selection.front)
    return replace(selection, best=better, front=front)


class _Timed:
    """A model with random weights whose steps are timed; nothing is learnt (the learning rate is zero)."""

    def __init__(self, recipe: Recipe, config: PretrainedConfig, load: Load) -> None:
        precision = recipe.get(Precision)
        assert precision is not None, "complete() fills in the precision"
        self.device = torch.device(recipe.device)
        model = random_model(config, precision.loading_dtype(recipe), recipe.seed)
        self.run = build(recipe, model, self.device)
        self.batches, self.scale = _micro_batches(load, self.run.layout, config.get_text_config().vocab_size)
        self.num_supervised = max(1, sum(batch.num_supervised for batch in self.batches))
        self.optimizer = self.run.make_optimizer(parameter_groups(self.run))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.run.use_grad_scaler)
        set_learning_rate(self.optimizer, 0.0)
        if self.run.update_in_backward:
            update_in_backward(self.run, self.optimizer)

    def step(self) -> float:
        """Do a step of the chosen micro-batches and return the seconds of one with all of them."""
        started = self._now()
        begin_step(self.run, 0)
        gradients(self.run, iter(self.batches), self.num_supervised, self.scaler)
        learnt = self._now()
        if not self.run.update_in_backward:
            clipped_norm(self.run, self.optimizer, self.scaler)
            update(self.run, self.optimizer, self.scaler)
        return (learnt - started) * self.scale + self._now() - learnt

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _micro_batches(load: Load, layout: Layout, vocab_size: int) -> tuple[list[MicroBatch], float]:
    """Return micro-batches of the most usual sampled step, and how many such parts a mean step has.

    Tokens are drawn at random: what they are does not change a step's time, but that they differ does (experts).
    """
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocab_size, len(load.corpus.token_ids)).astype(np.int32)
    corpus = Corpus(ids, load.corpus.is_supervised, load.corpus.offsets, load.corpus.origins)
    mean = load.tokens_per_step
    step = min(load.steps, key=lambda documents: abs(float(load.lengths[list(documents)].sum()) - mean))
    groups = layout.micro_batches(step, load.lengths)
    places = np.unique(np.linspace(0, len(groups) - 1, MOST_MICRO_BATCHES).round().astype(int))
    batches = [layout.build(groups[place], corpus) for place in places]
    positions = [_positions(layout.build(rows, corpus)) for rows in groups] if len(groups) > len(batches) else None
    share = 1.0 if positions is None else sum(positions) / sum(map(_positions, batches))
    return batches, share * mean / float(load.lengths[list(step)].sum())


def _positions(batch: MicroBatch) -> int:
    return batch.input_ids_RL.numel()
