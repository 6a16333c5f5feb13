"""The Run to its end: the one training loop, from the first step or from a checkpoint.

    while not finished:
        evaluate when due, keep the best, stop early
        save when due
        documents of this step -> micro-batches -> gradients -> update

The order of the lines in `Training.run` is the order in which things happen; there are no hooks. Who wants to watch
passes `observe`, which is called with every line that goes to `metrics.jsonl`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from tunewise.engine import checkpoint
from tunewise.engine.evaluate import validation_loss
from tunewise.engine.guard import check_finite_and_steady, smaller_layout
from tunewise.engine.host_memory import TRIM_EVERY_STEPS, give_back_free_memory
from tunewise.engine.noise import NoiseMeter
from tunewise.engine.noise_sums import NoiseSums
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.schedule import learning_rate_factor
from tunewise.engine.signals import StopRequest
from tunewise.engine.state import (
    Progress,
    capture,
    random_states,
    restore,
    restore_random_states,
    restore_trainable,
)
from tunewise.engine.step import (
    begin_step,
    clipped_norm,
    gradients,
    parameter_groups,
    set_learning_rate,
    update,
    update_in_backward,
)
from tunewise.engine.stopping import forgetting_of_what_is_kept, is_within_budget, reason_to_finish
from tunewise.errors import CheckpointError, Conflict, InputError, Interrupted, TrainingDiverged
from tunewise.methods.method import Run
from tunewise.workload.batches import GlobalBatches, MicroBatch
from tunewise.workload.corpus import Corpus

Observe = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """What a finished training run came to.

    Attributes:
        steps: optimizer steps done.
        reason: why it ended ("all steps done", "no better validation loss for 3 evaluations").
        first_loss: validation loss before the first step, nats per supervised token; None without validation data.
        best_loss, best_step: the lowest validation loss after a step of training, and that step; with
            `evaluation.keep_best` that state is what is in the model now.
    forgetting: by how much the loss on the general text is above what it was before training, in nats per token, for
        the state that is in the model now; None where it was not measured.
        tokens, supervised_tokens, seconds: the work done, over all resumptions.
        peak_memory_bytes: the most that the device held (CUDA), or the largest resident size seen (CPU).
    """

    steps: int
    reason: str
    first_loss: float | None
    best_loss: float | None
    best_step: int | None
    forgetting: float | None
    tokens: int
    supervised_tokens: int
    seconds: float
    peak_memory_bytes: int


class Training:
    """One training run: a Run, its data, its folder and its progress."""

    def __init__(
        self,
        run: Run,
        train: Corpus,
        validation: Corpus,
        num_steps: int,
        folder: RunFolder,
        observe: Observe,
        *,
        general: Corpus | None = None,
        saves: bool = True,
        measures_noise: bool = False,
    ) -> None:
        """Prepare a training of `run`.

        Args:
            run: what is trained.
            train, validation: the documents.
            num_steps: optimizer steps of the whole run.
            folder: an open run folder.
            observe: called with every line that goes to `metrics.jsonl`.
            general: general text, whose loss every evaluation takes too.
            saves: whether checkpoints are written; a trial that nobody resumes does without.
            measures_noise: whether the gradient's noise is taken from steps of several micro-batches (`noise`); it
                keeps a copy of what the gradients were before.
        """
        recipe = run.recipe
        self.saves = saves
        self.noise: list[NoiseSums] = []
        self._meter = NoiseMeter(parameter for _, parameter in run.trainable()) if measures_noise else None
        self.built, self.corpus, self.validation = run, train, validation
        self.num_steps, self.folder, self._observe = num_steps, folder, observe
        self.batches = GlobalBatches(train, recipe.batch, recipe.seed)
        self.validation_documents = list(range(min(len(validation), recipe.evaluation.max_documents)))
        self.general = general
        if recipe.evaluation.forgetting_budget is not None and (general is None or not self.validation_documents):
            raise InputError(
                "evaluation.forgetting_budget: the best state within the budget is found by the validation loss and "
                "the loss on general text; one of the two is missing. Set data.validation_fraction above 0."
            )
        self.optimizer = run.make_optimizer(parameter_groups(run))
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.use_grad_scaler)
        size, row_tokens = run.layout.micro_batch_size, run.layout.row_tokens
        self.progress = Progress(size, row_tokens, recipe.evaluation.micro_batch_size or size, row_tokens)
        self.first_loss: float | None = None
        self._saved: Progress | None = None
        self._peak_bytes = 0
        if run.update_in_backward:
            self._require_single_micro_batches()
            update_in_backward(run, self.optimizer)

    def resume(self) -> None:
        """Take up the newest intact checkpoint.

        Raises:
            CheckpointError: there is none, or it belongs to other parameters.
        """
        path, tensors, state, problems = checkpoint.newest_intact(self.folder.checkpoints)
        try:
            self.progress = restore(self.built, self.optimizer, self.scaler, tensors, state)
            self.first_loss = state["first_loss"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is intact, but not what this version of tunewise writes ({type(error).__name__}: {error}). "
                "Resume with the version in versions.json."
            ) from error
        self.built.layout = self.progress.layout(self.built.layout)
        self._saved = replace(self.progress)
        for problem in problems:
            self.record({"event": "damaged_checkpoint", "message": problem})
        self.record({"event": "resumed", "step": self.progress.step, "from": path.name})

    def run(self) -> Outcome:
        """Train to the end, restore the best state, and return what came of it.

        Raises:
            Interrupted: a signal asked for a stop; the state is saved.
            TrainingDiverged: the loss or a gradient is not finite any more, or the loss jumped.
            DoesNotFit: not even the smallest layout fits into memory.
        """
        progress, recipe = self.progress, self.built.recipe
        steps = self.batches.from_step(progress.step)
        with StopRequest() as stop:
            while progress.finished is None:
                if self._evaluation_is_due():
                    self._evaluate(stop)
                if stop:
                    self._leave(stop)
                progress.finished = reason_to_finish(progress, recipe.evaluation, self.num_steps)
                every = recipe.checkpoints.every or self.num_steps
                if progress.finished is not None or progress.step % every == 0 or self._is_new_best():
                    self._save()
                if progress.finished is None:
                    epoch, documents = next(steps)
                    self._step(epoch, documents)
        self._restore_best()
        return self._outcome()

    def _step(self, epoch: int, documents: list[int]) -> None:
        """One global step, with as many smaller layouts as it takes to fit."""
        run, progress, spec = self.built, self.progress, self.built.recipe.training
        started = time.perf_counter()
        learning_rate = (spec.learning_rate or 0.0) * learning_rate_factor(spec, progress.step, self.num_steps)
        set_learning_rate(self.optimizer, learning_rate)
        num_supervised = int(self.corpus.num_supervised[documents].sum())
        random_state = random_states(run.device)
        begin_step(run, progress.step, self.num_steps)
        loss = self._gradients_that_fit(documents, num_supervised)
        if self._meter is not None and (sums := self._meter.finish(num_supervised, self.scaler.get_scale())):
            self.noise.append(sums)
        norm = 0.0 if run.update_in_backward else float(clipped_norm(run, self.optimizer, self.scaler))
        try:
            check_finite_and_steady(self, loss, norm, documents)
        except TrainingDiverged:
            restore_random_states(run.device, random_state)
            if not run.update_in_backward:
                self._save()
            raise
        if not run.update_in_backward:
            update(run, self.optimizer, self.scaler)
        seconds = time.perf_counter() - started
        num_tokens = int(self.corpus.lengths[documents].sum())
        smoothed = progress.smoothed_loss
        progress.smoothed_loss = loss if smoothed is None else 0.9 * smoothed + 0.1 * loss
        progress.step += 1
        progress.tokens += num_tokens
        progress.supervised_tokens += num_supervised
        progress.seconds += seconds
        if run.device.type == "cpu" and progress.step % TRIM_EVERY_STEPS == 0:
            give_back_free_memory()
        self.record(
            {
                "event": "step",
                "step": progress.step,
                "epoch": epoch,
                "loss": loss,
                "grad_norm": norm if math.isfinite(norm) else None,  # fp16's scaler skips such a step
                "learning_rate": learning_rate,
                "tokens": num_tokens,
                "supervised_tokens": num_supervised,
                "seconds": round(seconds, 6),
                "memory_bytes": self._memory_bytes(),
            }
        )

    def _gradients_that_fit(self, documents: list[int], num_supervised: int) -> float:
        """Compute the step's gradients; when memory runs out, again in a smaller layout with the same random state."""
        run, progress = self.built, self.progress
        random_state = random_states(run.device)
        while True:
            try:
                batches = self._micro_batches(documents)
                return float(gradients(run, batches, num_supervised, self.scaler, self._meter))
            except (RuntimeError, MemoryError) as error:
                run.layout = smaller_layout(self, error, "training", run.layout, self.corpus.lengths[documents])
            progress.micro_batch_size, progress.row_tokens = run.layout.micro_batch_size, run.layout.row_tokens
            self.optimizer.zero_grad(set_to_none=True)
            self._free_cached_memory()
            restore_random_states(run.device, random_state)

    def _free_cached_memory(self) -> None:
        """Give back what the caching allocator keeps in sizes that nobody asks for any more."""
        if self.built.device.type == "cuda":
            torch.cuda.empty_cache()

    def _micro_batches(self, documents: list[int]) -> Iterator[MicroBatch]:
        layout = self.built.layout
        for rows in layout.micro_batches(documents, self.corpus.lengths):
            yield layout.build(rows, self.corpus)

    def _require_single_micro_batches(self) -> None:
        """An update inside backward leaves no gradients to accumulate, so each step must be one micro-batch."""
        layout, lengths = self.built.layout, self.corpus.lengths
        most = max(len(layout.micro_batches(documents, lengths)) for documents in self.batches.epoch(0))
        if most > 1:
            raise Conflict(
                f"in_backward: some steps need {most} micro-batches, and an update inside backward cannot accumulate "
                "them. Raise batch.micro_batch_size so that every step is one micro-batch, or lower batch.documents."
            )

    def _evaluation_is_due(self) -> bool:
        progress, every = self.progress, self.built.recipe.evaluation.every
        if not self.validation_documents or progress.evaluated_step == progress.step or every is None:
            return False
        return progress.step % every == 0 or progress.step >= self.num_steps

    def _evaluate(self, stop: StopRequest) -> None:
        progress, started = self.progress, time.perf_counter()
        loss = self._loss_that_fits(self.validation, self.validation_documents, stop)
        general = None
        if self.general is not None:
            general = self._loss_that_fits(self.general, range(len(self.general)), stop)
        if loss is None or (general is None and self.general is not None):
            return  # asked to stop: the evaluation is done again after the resume
        if not math.isfinite(loss) or not math.isfinite(general or 0.0):
            raise TrainingDiverged(
                f"The validation loss after step {progress.step} is {loss}"
                + ("" if general is None else f", the loss on the general text {general}")
                + ". The checkpoints stay."
            )
        progress.evaluated_step, progress.validation_loss, progress.general_loss = progress.step, loss, general
        if progress.step == 0:  # what is measured here is where training starts, no result of it
            self.first_loss, progress.first_general_loss = loss, general
        elif is_within_budget(progress, self.built.recipe.evaluation) and (
            progress.best_loss is None or loss < progress.best_loss
        ):
            progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
            progress.best_general_loss = general
        else:
            progress.evaluations_since_best += 1
        progress.seconds += time.perf_counter() - started
        is_best = progress.best_step == progress.step
        entry = {"event": "evaluation", "step": progress.step, "validation_loss": loss, "is_best": is_best}
        self.record(entry if general is None else {**entry, "general_loss": general})

    def _loss_that_fits(self, corpus: Corpus, documents: Sequence[int], stop: StopRequest) -> float | None:
        """Take the loss over documents, in a smaller layout (evaluation's own) whenever memory runs out."""
        run, progress = self.built, self.progress
        while True:
            layout = progress.evaluation_layout(run.layout)
            try:
                return validation_loss(run, corpus, documents, layout, lambda: bool(stop))
            except (RuntimeError, MemoryError) as error:
                layout = smaller_layout(self, error, "evaluation", layout, corpus.lengths[documents])
            progress.evaluation_micro_batch_size = layout.micro_batch_size
            progress.evaluation_row_tokens = layout.row_tokens
            self._free_cached_memory()

    def _is_new_best(self) -> bool:
        progress = self.progress
        return self.built.recipe.evaluation.keep_best and progress.best_step == progress.step

    def _save(self) -> None:
        progress = self.progress
        if self._saved == progress or not self.saves:
            return
        tensors, state = capture(self.built, self.optimizer, self.scaler, progress)
        path = checkpoint.save_checkpoint(
            self.folder.checkpoints, progress.step, tensors, {**state, "first_loss": self.first_loss}
        )
        self._saved = replace(progress)
        best = progress.best_step if self.built.recipe.evaluation.keep_best else None
        checkpoint.remove_old(self.folder.checkpoints, self.built.recipe.checkpoints.keep, keep_also=best)
        self.record({"event": "checkpoint", "step": progress.step, "path": str(path.relative_to(self.folder.path))})

    def _leave(self, stop: StopRequest) -> None:
        self._save()
        assert stop.signal_number is not None
        raise Interrupted(
            stop.signal_number,
            f"Stopped at step {self.progress.step} of {self.num_steps}; everything is saved. "
            f"Continue with: tunewise train --resume {self.folder.path}",
        )

    def _restore_best(self) -> None:
        progress = self.progress
        if not self.built.recipe.evaluation.keep_best or progress.best_step in (None, progress.step):
            return
        assert progress.best_step is not None
        path: Path = self.folder.checkpoints / checkpoint.checkpoint_name(progress.best_step)
        try:
            tensors, _ = checkpoint.load_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(f"The best state (step {progress.best_step}) cannot be restored. {error}") from error
        restore_trainable(self.built, tensors)

    def _memory_bytes(self) -> int:
        if self.built.device.type == "cuda":
            self._peak_bytes = torch.cuda.max_memory_allocated(self.built.device)
            return self._peak_bytes
        resident: int = psutil.Process().memory_info().rss
        self._peak_bytes = max(self._peak_bytes, resident)
        return resident

    def record(self, entry: dict[str, Any]) -> None:
        """Write one line to metrics.jsonl and show it to who watches."""
        self.folder.record(entry)
        self._observe(entry)

    def _outcome(self) -> Outcome:
        progress = self.progress
        return Outcome(
            steps=progress.step,
            reason=progress.finished or "",
            first_loss=self.first_loss,
            best_loss=progress.best_loss,
            best_step=progress.best_step,
            forgetting=forgetting_of_what_is_kept(progress, self.built.recipe.evaluation),
            tokens=progress.tokens,
            supervised_tokens=progress.supervised_tokens,
            seconds=progress.seconds,
            peak_memory_bytes=self._peak_bytes,
        )
