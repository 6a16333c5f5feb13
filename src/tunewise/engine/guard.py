"""What stands between one bad step and a ruined run: not-a-number, a jump of the loss, memory that runs out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunewise.engine.run_folder import RunFolder, write_whole
from tunewise.engine.state import Progress
from tunewise.engine.step import is_out_of_memory
from tunewise.errors import DoesNotFit, TrainingDiverged
from tunewise.methods.method import Run
from tunewise.workload.batches import Layout
from tunewise.workload.corpus import Corpus


class Guarded(Protocol):
    """What the guard needs to see of a training run."""

    built: Run
    corpus: Corpus
    folder: RunFolder
    progress: Progress

    def record(self, entry: dict[str, Any]) -> None:
        """Write one line to metrics.jsonl."""


def check_finite_and_steady(training: Guarded, loss: float, norm: float, documents: Sequence[int]) -> None:
    """Stop before the optimizer touches the weights when this step's loss or gradient is not to be trusted.

    Updates in backward have touched them by then; the checkpoints have not got these. A jump is a loss more than
    `training.spike` nats above its running mean. Under fp16 scaling an infinite gradient is no failure: the scaler
    skips the step and lowers its scale.

    Raises:
        TrainingDiverged: says why, and where the batch was written.
    """
    spec, smoothed = training.built.recipe.training, training.progress.smoothed_loss
    if not math.isfinite(loss):
        reason = f"the loss is {loss}"
    elif not math.isfinite(norm) and not training.built.use_grad_scaler:
        reason = f"the gradient's norm is {norm}"
    elif spec.spike is not None and smoothed is not None and loss > smoothed + spec.spike:
        reason = f"the loss jumped from about {smoothed:.3f} to {loss:.3f} (training.spike is {spec.spike})"
    else:
        return
    step = training.progress.step + 1
    file = training.folder.path / f"diverged-step-{step:08d}.json"
    content = {
        "step": step,
        "reason": reason,
        "documents": [
            {
                "index": index,
                "origin": training.corpus.origins[index],
                "num_tokens": int(training.corpus.lengths[index]),
            }
            for index in documents
        ],
    }
    write_whole(file, json.dumps(content, indent=1))
    training.record({"event": "diverged", "step": step, "message": reason, "batch": file.name})
    saved = "in the newest checkpoint" if training.built.update_in_backward else "untouched and saved"
    raise TrainingDiverged(
        f"Stopped at step {step}: {reason}. The batch that caused it is in {file}; the weights before it are {saved}. "
        "Lower training.learning_rate, or look at these records."
    )


def smaller_layout(
    training: Guarded, error: Exception, moment: str, layout: Layout, lengths: NDArray[np.int64]
) -> Layout:
    """Return the next smaller layout after `error` in `moment` ("training", "evaluation"), and put it on record.

    Args:
        lengths: of the documents that did not fit; they stay together.

    Raises:
        DoesNotFit: there is none, the recipe says to stop, or part of the step has already been applied.
        Exception: `error` itself when it is not memory running out.
    """
    if not is_out_of_memory(error):
        raise error
    reason = (str(error) or type(error).__name__).splitlines()[0]
    run, longest = training.built, int(lengths.max())
    is_half_done = moment == "training" and run.update_in_backward
    if run.recipe.training.oom == "stop" or is_half_done:
        size = layout.micro_batch_size
        raise DoesNotFit(f"Out of memory in {moment} at micro_batch_size {size}: {reason}") from error
    smaller = layout.smaller(longest)
    if smaller is None:
        raise DoesNotFit(
            f"Out of memory in {moment} with one row of {max(longest, layout.row_tokens or 0)} tokens: {reason}\n"
            "  What would help: the method 'checkpointing', 'quantize', a smaller data.max_length."
        ) from error
    training.record(
        {
            "event": "out_of_memory",
            "moment": moment,
            "step": training.progress.step,
            "micro_batch_size": smaller.micro_batch_size,
            "row_tokens": smaller.row_tokens,
            "message": reason,
        }
    )
    return smaller
