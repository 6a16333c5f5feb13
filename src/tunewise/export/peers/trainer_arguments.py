"""What TRL, axolotl and LLaMA-Factory share: the arguments of Hugging Face's `TrainingArguments` (transformers 5).

Names and meanings were read from transformers 5.24: `training_args.py`, `trainer_optimizer.py`, `optimization.py`.
"""

from __future__ import annotations

import math
from typing import Any

from tunewise.engine.schedule import WSD_DECAY, warmup_steps
from tunewise.export.peers.config import Facts
from tunewise.export.peers.ledger import Ledger
from tunewise.methods import Checkpointing
from tunewise.methods.defaults import DEFAULT_EVALUATIONS
from tunewise.recipe import Recipe, Slot

OPTIMIZERS = {
    "sgd": "sgd",
    "adagrad": "adagrad",
    "rmsprop": "rmsprop",
    "adam": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "lion": "lion_32bit",
}
"""Our optimizers and transformers' names for them."""

_ARGUMENTS = {
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "sgd.momentum": "momentum",
    "sgd.nesterov": "nesterov",
    "adagrad.eps": "eps",
    "rmsprop.decay": "alpha",
    "rmsprop.momentum": "momentum",
    "rmsprop.eps": "eps",
    "eps": "adam_epsilon",
}
"""Options of ours and where they go: names with `adam_` are arguments, the others belong into `optim_args`."""

LARGEST_SEED = 2**32 - 1
"""numpy's, which transformers and torchtune seed too."""


def optimizer_arguments(ledger: Ledger, recipe: Recipe, optim: str = "optim") -> dict[str, Any]:
    """Return optimizer, its options, weight decay and clipping; `optim` is the key of the optimizer's name."""
    (method,) = recipe.in_slot(Slot.OPTIMIZER)
    name = method.name
    ledger.take(name, optim)
    written: dict[str, Any] = {optim: OPTIMIZERS[name]}
    extra: dict[str, Any] = {}
    for option in type(method).model_fields:
        value, setting = getattr(method, option), f"{name}.{option}"
        argument = _ARGUMENTS.get(setting) or _ARGUMENTS.get(option)
        if option == "in_backward":
            ledger.need(setting, False, otherwise=f"{ledger.peer} updates after the whole backward pass only")
        elif setting == "rmsprop.nesterov":
            ledger.need(setting, False, otherwise="torch's RMSprop has plain momentum only")
        elif option == "fused":
            ledger.take(setting, optim)
            written[optim] += "_fused" if value else ""
        elif name == "adafactor":
            default = type(method).model_fields[option].default
            ledger.need(setting, default, otherwise=f"transformers' Adafactor is always made with {default}")
        elif argument is not None:
            ledger.take(setting, argument if argument.startswith("adam_") else f"optim_args: {argument}")
            (written if argument.startswith("adam_") else extra)[argument] = value
    if extra:
        written["optim_args"] = ",".join(f"{key}={value}" for key, value in extra.items())
    decay = written["weight_decay"] = ledger.take("training.weight_decay", "weight_decay")
    _say_other_mathematics(ledger, name, decay)
    norm = ledger.take("training.max_grad_norm", "max_grad_norm")
    written["max_grad_norm"] = 0.0 if norm is None else norm  # the Trainer clips when it is above 0
    return written


def _say_other_mathematics(ledger: Ledger, name: str, weight_decay: float) -> None:
    if name == "adam" and weight_decay > 0:
        ledger.miss("adam", "transformers has no Adam with coupled weight decay; written as AdamW")
    if name == "adafactor":
        ledger.miss(
            "adafactor",
            "transformers' Adafactor takes the learning rate as it is; tunewise's (torch's) multiplies it by the root "
            "mean square of each weight, so lower it",
        )


def schedule_arguments(ledger: Ledger, recipe: Recipe, facts: Facts, scheduler: str) -> dict[str, Any]:
    """Return learning rate and schedule, without warm-up; `scheduler` is the key of the schedule's name."""
    spec = recipe.training
    ledger.take("training.learning_rate", "learning_rate")
    ledger.take("training.schedule", scheduler)
    ledger.take("training.final_learning_rate", f"{scheduler}_kwargs".replace("_type", ""))
    floor, rate = spec.final_learning_rate, spec.learning_rate or 0.0
    kwargs: dict[str, Any] = {}
    match spec.schedule:
        case "linear" if floor > 0:
            name, kwargs = "polynomial", {"power": 1.0, "lr_end": rate * floor}
        case "linear":
            name = "linear"
        case "cosine" if floor > 0:
            name, kwargs = "cosine_with_min_lr", {"min_lr_rate": floor}
        case "cosine":
            name = "cosine"
        case "constant":
            name = "constant_with_warmup" if spec.warmup > 0 else "constant"
        case "inverse_sqrt":
            name = "inverse_sqrt"
            if spec.warmup == 0:  # transformers takes 10,000 steps without warm-up
                kwargs = {"timescale": 1}
            if floor > 0:
                ledger.miss("training.final_learning_rate", "transformers' inverse_sqrt has no lower bound")
        case "wsd":
            name, kwargs = _stable_then_decay(ledger, recipe, facts)
    written = {"learning_rate": rate, scheduler: name}
    if kwargs:
        written["lr_scheduler_kwargs"] = kwargs
    return written


def _stable_then_decay(ledger: Ledger, recipe: Recipe, facts: Facts) -> tuple[str, dict[str, Any]]:
    steps = recipe.training.steps or facts.num_steps
    if steps is None:
        ledger.miss(
            "training.schedule",
            "transformers' warmup_stable_decay wants the number of decaying steps, which depends on the data; written "
            "as cosine. Plan with --data or --documents.",
        )
        return "cosine", {}
    after = steps - warmup_steps(recipe.training, steps)
    decay = max(1, math.ceil(after * WSD_DECAY))
    floor = recipe.training.final_learning_rate
    return "warmup_stable_decay", {
        "num_stable_steps": after - decay, "num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": floor,
    }  # fmt: skip


def length_arguments(ledger: Ledger, recipe: Recipe, facts: Facts, epochs: str) -> dict[str, Any]:
    """Return how long the run is; `epochs` is the key of the number of epochs."""
    spec = recipe.training
    ledger.take("training.epochs", epochs)
    ledger.take("training.steps", "max_steps")
    ledger.take("training.tokens", "max_steps")
    if spec.steps is not None:
        return {"max_steps": spec.steps}
    if spec.tokens is None:
        return {epochs: spec.epochs}
    if facts.num_steps is not None:
        ledger.miss("training.tokens", f"{ledger.peer} counts steps; written as the {facts.num_steps} that they take")
        return {"max_steps": facts.num_steps}
    ledger.miss("training.tokens", f"{ledger.peer} counts epochs or steps; one epoch is written, set your own end")
    return {epochs: 1.0}


def intervals(ledger: Ledger, recipe: Recipe) -> tuple[float, float]:
    """Return the intervals of evaluation and saving: steps, or a share of the run where the recipe leaves it open.

    transformers loads the best checkpoint at the end only when every evaluation that saves has been saved, so with
    `keep_best` or `patience` the second is made a multiple of the first.
    """
    share = 1 / DEFAULT_EVALUATIONS
    evaluate = ledger.take("evaluation.every", "eval_steps") or share
    save = ledger.take("checkpoints.every", "save_steps") or share
    wants_best = has_validation(recipe) and (recipe.evaluation.keep_best or recipe.evaluation.patience is not None)
    fits = (evaluate < 1) == (save < 1) and round(save / evaluate, 9) % 1 == 0
    if wants_best and not fits:
        if recipe.checkpoints.every is not None:
            ledger.miss("checkpoints.every", f"to keep the best, {ledger.peer} saves when it evaluates: {evaluate:g}")
        save = evaluate
    return evaluate, save


def has_validation(recipe: Recipe) -> bool:
    """Whether the recipe sets documents aside."""
    return recipe.data.validation is not None or recipe.data.validation_fraction > 0


def name_guards(ledger: Ledger, recipe: Recipe, *, evaluates: bool = True) -> None:
    """Name tunewise's guards, which these tools have not got; `evaluates` says whether the tool evaluates at all."""
    ledger.need("training.spike", None, otherwise=f"{ledger.peer} goes on when the loss jumps")
    ledger.need("training.oom", "stop", otherwise=f"{ledger.peer} ends when the memory runs out")
    if evaluates and has_validation(recipe):
        ledger.miss("evaluation.max_documents", f"{ledger.peer} evaluates on all of the validation documents")
    else:
        ledger.without_effect("evaluation.max_documents")


def warmup_argument(ledger: Ledger) -> dict[str, Any]:
    """Return the warm-up; like ours it is a share of the run below 1, else a count."""
    warmup = ledger.take("training.warmup", "warmup_steps")
    return {"warmup_steps": warmup if warmup < 1 else int(warmup)}


def evaluation_arguments(ledger: Ledger, recipe: Recipe, patience: str | None) -> dict[str, Any]:
    """Return when is evaluated and saved; `patience` is the key for stopping early, None where there is none."""
    spec = recipe.evaluation
    evaluate, save = intervals(ledger, recipe)
    keep = ledger.take("checkpoints.keep", "save_total_limit")
    written: dict[str, Any] = {"save_strategy": "steps", "save_steps": save, "save_total_limit": keep}
    if not has_validation(recipe):
        for setting in ("keep_best", "patience", "micro_batch_size"):
            ledger.without_effect(f"evaluation.{setting}")
        return {"eval_strategy": "no", **written}
    rows = ledger.take("evaluation.micro_batch_size", "per_device_eval_batch_size") or recipe.batch.micro_batch_size
    ledger.take("evaluation.keep_best", "load_best_model_at_end")
    written |= {"eval_strategy": "steps", "eval_steps": evaluate, "per_device_eval_batch_size": rows}
    if patience is not None:
        ledger.take("evaluation.patience", patience)
    else:
        ledger.need("evaluation.patience", None, otherwise=f"{ledger.peer}'s command does not stop early")
    if spec.keep_best or (patience is not None and spec.patience is not None):
        written |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    if patience is not None and spec.patience is not None:
        written[patience] = spec.patience
    return written


def checkpointing_arguments(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    """Return gradient checkpointing, all but its policy, for which each tool has words of its own."""
    if recipe.get(Checkpointing) is None:
        return {"gradient_checkpointing": False}
    ledger.take("checkpointing", "gradient_checkpointing")
    ledger.need("checkpointing.every", 1, otherwise=f"{ledger.peer} checkpoints every block")
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def seed_of(ledger: Ledger) -> int:
    """Return the seed, within what numpy takes."""
    seed = int(ledger.take("seed", "seed"))
    if seed > LARGEST_SEED:
        seed %= LARGEST_SEED + 1
        ledger.miss("seed", f"numpy's seeds end at {LARGEST_SEED}; written as {seed}")
    return seed


def reports(ledger: Ledger) -> list[str] | str:
    """Return where the run is reported to."""
    names = list(ledger.take("report_to", "report_to"))
    return names or "none"
