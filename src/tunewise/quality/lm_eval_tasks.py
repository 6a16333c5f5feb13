"""Tasks of EleutherAI's lm-evaluation-harness, where it is installed: `--suite lm_eval:TASK`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tunewise.engine.generate import cached_attention
from tunewise.errors import InputError, MissingBackend
from tunewise.layers.head import base_model_of
from tunewise.quality.battery import Items

if TYPE_CHECKING:
    from tunewise.quality.suites import Subject

LM_EVAL = "lm_eval:"
LIMIT = 200


def lm_eval_suite(task: str) -> Callable[[Subject], dict[str, Items]]:
    """Return a suite that runs one of the harness's tasks on at most `LIMIT` documents.

    Raises:
        MissingBackend: the harness is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise MissingBackend("lm_eval", f"The suite {LM_EVAL}{task}", "lm-eval") from None

    def suite(subject: Subject) -> dict[str, Items]:
        with cached_attention(subject.run):
            model = HFLM(pretrained=base_model_of(subject.run.model), tokenizer=subject.tokenizer, batch_size=8)
            try:
                found = lm_eval.simple_evaluate(model=model, tasks=[task], limit=LIMIT, log_samples=True)
            except (KeyError, ValueError) as error:
                raise InputError(f"--suite {LM_EVAL}{task}: the harness refuses it: {error}") from error
        return items_of(found["samples"])

    return suite


def items_of(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Items]:
    """Return the harness's logged samples as items: every metric that gives a number for each document."""
    found: dict[str, Items] = {}
    for task, logged in samples.items():
        for metric in logged[0].get("metrics", []) if logged else []:
            values = [sample[metric] for sample in logged]
            if all(isinstance(value, bool | int | float | np.number) for value in values):
                found[f"{task}, {metric}"] = Items.of([float(value) for value in values])
    return found
