"""The recommended step, timed on this machine before anybody trains: on shallow copies of the model, extended in depth.

A roofline knows ceilings, not caches, fresh pages or kernels that fit a shape badly. What a step really takes is known
to who runs it. All blocks of a kind take equally long, so the engine's own step on two models of few blocks, with
random weights of the true shapes and rows of the true lengths, gives the step of the whole model. Both are timed in
turns, so that a machine that slows down slows down both, and every turn takes another step of the data: a training
never meets the same shapes again either. The shallow models are deep enough not to live in the processor's cache.
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
from tunewise.engine.skeleton import block_sizes
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

CACHE_BYTES = 256 * 2**20
"""A shallow model whose weights are smaller may live in a processor's last cache, where the whole model would not."""

OFF_BY = (0.84, 1.13)
"""Measured over rehearsed time: the range of 30 trainings on two cores (benchmarks/estimate/time_cpu.py)."""


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
    fewest = _blocks_beyond_the_cache(config, recipe)
    pairs = (shallow_depths(config, recipe, apart, fewest) for apart in range(APART, 0, -1))
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
        taken = [each.step(len(seconds)) for each in timed]
        seconds.append(taken[0] + (taken[-1] - taken[0]) * factor)
    del timed
    gc.collect()
    rounds = seconds[WARM_UP:]
    middle = statistics.median(rounds)
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Rehearsal(Interval(middle, low * OFF_BY[0], high * OFF_BY[1]), blocks, len(rounds))


def _blocks_beyond_the_cache(config: PretrainedConfig, recipe: Recipe) -> int:
    """Return how many blocks have more weights than a processor's cache holds; at least 2."""
    precision = recipe.get(Precision)
    assert precision is not None, "complete() fills in the precision"
    smallest = min(block_sizes(config), default=CACHE_BYTES) * precision.loading_dtype(recipe).itemsize
    return max(2, -(-CACHE_BYTES // max(1, smallest)))


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
        self.steps = _Steps(load, self.run.layout, config.get_text_config().vocab_size)
        self.optimizer = self.run.make_optimizer(parameter_groups(self.run))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.run.use_grad_scaler)
        set_learning_rate(self.optimizer, 0.0)
        if self.run.update_in_backward:
            update_in_backward(self.run, self.optimizer)

    def step(self, number: int) -> float:
        """Do some micro-batches of a sampled step and return the seconds of a mean step with all of them."""
        batches, scale = self.steps.micro_batches(number)
        num_supervised = max(1, sum(batch.num_supervised for batch in batches))
        started = self._now()
        begin_step(self.run, 0)
        gradients(self.run, iter(batches), num_supervised, self.scaler)
        learnt = self._now()
        if not self.run.update_in_backward:
            clipped_norm(self.run, self.optimizer, self.scaler)
            update(self.run, self.optimizer, self.scaler)
        return (learnt - started) * scale + self._now() - learnt

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Steps:
    """The sampled steps as micro-batches of random tokens.

    What the tokens are does not change a step's time, but that they differ does (experts).
    """

    def __init__(self, load: Load, layout: Layout, vocab_size: int) -> None:
        generator = np.random.default_rng(0)
        ids = generator.integers(0, vocab_size, len(load.corpus.token_ids)).astype(np.int32)
        self.corpus = Corpus(ids, load.corpus.is_supervised, load.corpus.offsets, load.corpus.origins)
        self.load, self.layout = load, layout
        self.order = generator.permutation(len(load.steps))

    def micro_batches(self, number: int) -> tuple[list[MicroBatch], float]:
        """Return micro-batches of one sampled step, and how many such parts a mean step has."""
        step = self.load.steps[self.order[number % len(self.order)]]
        groups = self.layout.micro_batches(step, self.load.lengths)
        places = np.unique(np.linspace(0, len(groups) - 1, MOST_MICRO_BATCHES).round().astype(int))
        batches = [self.layout.build(groups[place], self.corpus) for place in places]
        share = 1.0
        if len(groups) > len(batches):
            positions = [_positions(self.layout.build(rows, self.corpus)) for rows in groups]
            share = sum(positions) / sum(map(_positions, batches))
        return batches, share * self.load.tokens_per_step / float(self.load.lengths[list(step)].sum())


def _positions(batch: MicroBatch) -> int:
    return batch.input_ids_RL.numel()
