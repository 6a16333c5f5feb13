"""What a recipe needs, without running it: the engine's own step on fake tensors.

    configuration -> fake model -> build -> gradients, clip, update -> evaluation -> saving

These are the functions that train for real; `Run.is_dry` is read where a value would be needed (see `build`). Nothing
is allocated, no weight is read, and depth costs nothing: two shallow models are traced and extended (`extension`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from tunewise.engine.build import build
from tunewise.engine.device_profile import PROFILES, DeviceKind, DeviceProfile
from tunewise.engine.estimate import Estimate, Trace
from tunewise.engine.evaluate import summed_loss
from tunewise.engine.extension import extend, shallow, shallow_depths
from tunewise.engine.fake_tensors import Answers, FakeTensors
from tunewise.engine.state import Progress, capture
from tunewise.engine.step import (
    begin_step,
    clipped_norm,
    gradients,
    parameter_groups,
    set_learning_rate,
    update,
    update_in_backward,
)
from tunewise.engine.tracking import Kind, Moment, Place, Tracker, marking
from tunewise.engine.unpacked_mask import use_unpacked_mask
from tunewise.engine.workspace import cpu_workspace
from tunewise.layers.fp8_lm import FP8LMAdamW, stored_gradients_of
from tunewise.layers.head import base_model_of
from tunewise.methods.method import Run
from tunewise.methods.precision import Precision
from tunewise.recipe import Recipe, Slot
from tunewise.workload.batches import MicroBatch
from tunewise.workload.model import random_model


@dataclass(frozen=True)
class BatchShape:
    """The shape of one micro-batch; its tokens do not matter.

    Attributes:
        document_lengths: for each row the lengths of its documents.
        num_supervised: how many tokens are learnt.
        width: positions in a row; None: the longest row.
    """

    document_lengths: tuple[tuple[int, ...], ...]
    num_supervised: int
    width: int | None = None

    @staticmethod
    def uniform(rows: int, length: int, supervised: float = 1.0) -> BatchShape:
        """Return `rows` rows of one document each; of its tokens but the first a share is learnt."""
        return BatchShape(((length,),) * rows, round(rows * (length - 1) * supervised))

    @staticmethod
    def of(batch: MicroBatch) -> BatchShape:
        """Return the shape of a micro-batch."""
        return BatchShape(batch.document_lengths, batch.num_supervised, batch.input_ids_RL.shape[1])

    def build(self) -> MicroBatch:
        """Make a micro-batch of this shape out of zeros (fake ones inside a FakeTensorMode)."""
        width = self.width or max(sum(row) for row in self.document_lengths)
        ids, positions, labels = (torch.zeros(len(self.document_lengths), width, dtype=torch.int64) for _ in range(3))
        return MicroBatch(
            input_ids_RL=ids,
            position_ids_RL=positions,
            labels_RL=labels,
            document_lengths=self.document_lengths,
            documents=(),
            num_supervised=self.num_supervised,
            num_tokens=sum(map(sum, self.document_lengths)),
        )


@dataclass(frozen=True)
class TraceJob:
    """The arguments of one `trace`; jobs do not depend on each other, so they can run in any process."""

    recipe: Recipe
    config: PretrainedConfig
    profile: DeviceProfile
    batches: tuple[BatchShape, ...]
    evaluation: BatchShape | None = None
    finish: Callable[[Run], object] | None = None
    saves: bool = True

    def run(self) -> Trace:
        """Do it."""
        return trace(
            self.recipe, self.config, self.profile, self.batches, self.evaluation, self.finish, saves=self.saves
        )


TraceAll = Callable[[Sequence[TraceJob]], Sequence[Trace]]
"""Runs jobs and returns their answers in the same order."""


def one_by_one(jobs: Sequence[TraceJob]) -> list[Trace]:
    """Run jobs in this process."""
    return [job.run() for job in jobs]


def dry_run(
    recipe: Recipe,
    config: PretrainedConfig,
    device_kind: DeviceKind,
    batches: BatchShape | Sequence[BatchShape],
    *,
    evaluation: BatchShape | None = None,
    profile: DeviceProfile | None = None,
    finish: Callable[[Run], object] | None = None,
    trace_all: TraceAll = one_by_one,
) -> Estimate:
    """Return what one step of `recipe`, an evaluation and saving need, with the optimizer's state already there.

    Args:
        recipe: a complete recipe (`tunewise.methods.complete`); `recipe.device` is the device it is meant for.
        config: the model's configuration; weights are neither read nor made.
        device_kind: where the step will run; this machine need not have it.
        batches: the micro-batches of the step. More than two of one size need no more memory than two.
        evaluation: a micro-batch of the evaluation; None: none is estimated.
        profile: what the device adds; None: the usual one of `device_kind`.
        finish: what is done with the run at the end (`export.merge.merge_adapters`), also estimated; None: nothing.
        trace_all: how the one or two traces are run.

    Raises:
        Conflict: the recipe's methods contradict each other or this model.
    """
    profile = profile or PROFILES[device_kind]
    shapes = (batches,) if isinstance(batches, BatchShape) else tuple(batches)
    depths = shallow_depths(config, recipe)
    models = [(config, recipe)] if depths is None else [shallow(config, recipe, kept) for kept in depths]
    traces = trace_all([TraceJob(each, model, profile, shapes, evaluation, finish) for model, each in models])
    if depths is None:
        (whole,) = traces
        peaks, work = whole.peaks(), dict(whole.work)
        counts, notes = (whole.trainable_parameters, whole.total_parameters), whole.notes
    else:
        small, large = traces
        peaks, work, counts = extend(small, large, int(config.get_text_config().num_hidden_layers))
        notes = large.notes
    if profile.kind != "cpu":
        peaks[Moment.SAVE] = peaks[Moment.SAVE].with_copies_on_the_host()
    return Estimate(
        moments=peaks,
        workspace_bytes=profile.workspace_bytes,
        context_bytes=profile.context_bytes,
        work=work,
        trainable_parameters=counts[0],
        total_parameters=counts[1],
        notes=notes,
    )


def trace(
    recipe: Recipe,
    config: PretrainedConfig,
    profile: DeviceProfile,
    batches: Sequence[BatchShape],
    evaluation: BatchShape | None = None,
    finish: Callable[[Run], object] | None = None,
    *,
    saves: bool = True,
) -> Trace:
    """Run the step of the whole model (no extension in depth) on fake tensors and return what was seen.

    Without `batches` the gradients of a step are there from nowhere, and only the update is seen.
    """
    with FakeTensors(), Answers(), torch.random.fork_rng(devices=[]):
        dry = _DryStep(recipe, config, profile)
        if all(len(row) == 1 for shape in batches for row in shape.document_lengths):
            use_unpacked_mask(base_model_of(dry.run.model))
        with dry.tracker, marking(dry.tracker, dry.blocks):
            dry.step(batches)
            if evaluation is not None:
                dry.evaluate(evaluation)
            if saves:
                dry.save()
            if finish is not None:
                dry.tracker.enter(Place(Moment.MERGE))
                finish(dry.run)
            dry.tracker.close()
        return dry.trace()


class _DryStep:
    """A run on fake tensors that is watched."""

    def __init__(self, recipe: Recipe, config: PretrainedConfig, profile: DeviceProfile) -> None:
        precision = recipe.get(Precision)
        if precision is None:
            raise ValueError("the recipe is not complete; pass it through tunewise.methods.complete first")
        # A copy, because setting the attention writes into the configuration.
        model = random_model(copy.deepcopy(config), precision.loading_dtype(recipe), recipe.seed)
        vocab_size = model.get_input_embeddings().num_embeddings
        of_the_base = list(model.parameters())  # held, so that no new parameter takes the identity of a freed one
        self.run = run = build(recipe, model, torch.device(profile.kind), is_dry=True)
        # Methods have chosen for the target; fake tensors live on the CPU whatever it is: a torch without CUDA cannot
        # run backward on fake CUDA ones.
        run.device = torch.device("cpu")
        base_ids = {id(parameter) for parameter in of_the_base}
        del of_the_base, model
        inner = base_model_of(run.model)
        self.blocks: list[nn.Module] = [m for m in inner.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.optimizer = run.make_optimizer(parameter_groups(run))
        self.stored_gradients = stored_gradients_of(self.optimizer)
        set_learning_rate(self.optimizer, 1e-3)
        self._make_state()
        self.tracker = Tracker(
            vocab_size=vocab_size,
            granularity=profile.granularity_bytes,
            workspace=cpu_workspace if profile.kind == "cpu" else None,
            has_fused_dropout=profile.kind == "cuda",
        )
        self.scaler = _Scaler(self.tracker, run.use_grad_scaler)
        self.tracker.enter(Place(Moment.FORWARD, 0, -1))
        adapter = {id(p) for _, p in run.trainable() if id(p) not in base_ids and recipe.in_slot(Slot.ADAPTER)}
        parameters = list(run.model.parameters())
        self.tracker.adopt((p for p in parameters if id(p) in adapter), Kind.ADAPTER)
        self.tracker.adopt((p for p in parameters if id(p) not in adapter), Kind.WEIGHTS)
        self.tracker.adopt(run.model.buffers(), Kind.WEIGHTS)
        self._adopt_state()
        self.num_trainable = sum(p.numel() for _, p in run.trainable())
        self.num_total = sum(p.numel() for p in run.model.parameters())
        for _, parameter in run.trainable():
            parameter.register_post_accumulate_grad_hook(self._adopt_gradient)
        if run.update_in_backward:
            update_in_backward(run, self.optimizer)

    def step(self, batches: Sequence[BatchShape]) -> None:
        """The lines of `engine.train.Training._step`."""
        run, num_supervised = self.run, sum(shape.num_supervised for shape in batches)
        if not batches:
            self.tracker.adopt(self._make_gradients(), Kind.GRADIENTS)
            torch.amp.GradScaler.scale(self.scaler, torch.zeros(()))  # an update unscales, so something was scaled
        begin_step(run, 1)
        gradients(run, self._micro_batches(batches), max(num_supervised, 1), self.scaler)
        self.tracker.enter(Place(Moment.UPDATE))
        if not run.update_in_backward:
            clipped_norm(run, self.optimizer, self.scaler)
            update(run, self.optimizer, self.scaler)
        self._adopt_state()

    def evaluate(self, shape: BatchShape) -> None:
        """The inner lines of `engine.evaluate.validation_loss`."""
        self.tracker.enter(Place(Moment.EVALUATION, 0, -1))
        self.run.model.eval()
        summed_loss(self.run, shape.build()).double()
        self.run.model.train()

    def save(self) -> None:
        """What a checkpoint holds: copies in the host's memory."""
        self.tracker.enter(Place(Moment.SAVE))
        size, row_tokens = self.run.layout.micro_batch_size, self.run.layout.row_tokens
        capture(self.run, self.optimizer, self.scaler, Progress(size, row_tokens, size, row_tokens))

    def trace(self) -> Trace:
        """Return what was seen."""
        return Trace(
            curves=self.tracker.curves(),
            work=self.tracker.work.totals(),
            num_blocks=len(self.blocks),
            trainable_parameters=self.num_trainable,
            total_parameters=self.num_total,
            notes=tuple(self.run.notes),
        )

    def _micro_batches(self, batches: Sequence[BatchShape]) -> Iterator[MicroBatch]:
        for part, shape in enumerate(batches):
            self.tracker.enter(Place(Moment.FORWARD, part, -1))
            yield shape.build()

    def _make_state(self) -> None:
        """A first update, so that the step that is watched finds the state that all but the first one find."""
        begin_step(self.run, 0)
        self._make_gradients()
        self.optimizer.step()
        for companion in self.run.companions.values():
            companion.after_update()
        self.optimizer.zero_grad(set_to_none=True)

    def _make_gradients(self) -> list[Tensor]:
        """Give every parameter a gradient of zeros, stored as the optimizer stores gradients."""
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
                if self.stored_gradients is not None:
                    cast(FP8LMAdamW, self.optimizer).take_gradient(index, parameter)
        return self._gradients()

    def _gradients(self) -> list[Tensor]:
        if self.stored_gradients is not None:
            return self.stored_gradients.tensors()
        return [parameter.grad for _, parameter in self.run.trainable() if parameter.grad is not None]

    def _adopt_state(self) -> None:
        for companion in self.run.companions.values():
            self.tracker.adopt(companion.state().values(), Kind.OPTIMIZER)
        for entries in self.optimizer.state.values():
            self.tracker.adopt((value for value in entries.values() if isinstance(value, Tensor)), Kind.OPTIMIZER)

    def _adopt_gradient(self, parameter: Tensor) -> None:
        if self.stored_gradients is not None:
            self.tracker.adopt(self.stored_gradients.tensors_of(parameter), Kind.GRADIENTS)
        elif parameter.grad is not None:
            self.tracker.adopt([parameter.grad], Kind.GRADIENTS)


class _Scaler(torch.amp.GradScaler):
    """The step's loss scaler, which also marks where backward begins and never reads the fake "infinity found"."""

    def __init__(self, tracker: Tracker, enabled: bool) -> None:
        super().__init__("cpu", enabled=enabled)
        self._tracker = tracker

    def scale(self, outputs: Any) -> Any:
        """Multiply the loss; the next line of the step is its backward pass."""
        scaled = super().scale(outputs)
        self._tracker.enter(self._tracker.place._replace(moment=Moment.BACKWARD, block=None))
        return scaled

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        del optimizer_state
        return optimizer.step(*args, **kwargs)
