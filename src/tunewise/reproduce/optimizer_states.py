"""Optimizers with small states on a small model from scratch: what it learns, and the bytes that their tensors take.

A Llama of 0.5 M parameters is trained on the `stdlib` text by tunewise's own loop; weights and data order are alike
within a seed, so losses compare pair by pair. Bytes are counted on the tensors of the optimizer's state, of the
gradients and of the weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunewise.engine.assemble import assemble
from tunewise.engine.step import parameter_groups
from tunewise.layers.fp8_lm import stored_gradients_of
from tunewise.methods.method import Run
from tunewise.reproduce.learning import figures_of, plan_of, scratch

PURE = {"compute": "bf16", "trainable": "same"}
PLAIN = dict.fromkeys(("gradient", "first_moment", "second_moment", "master"), "fp32")
BETAS = {"beta2": 0.95}


def _mixed(optimizer: str, **options: Any) -> dict[str, Any]:
    return {"precision": {"compute": "bf16"}, optimizer: options}


VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": _mixed("adamw", **BETAS),
    "fp8_lm": {"precision": PURE, "fp8_lm": BETAS},
    "all fp32": {"precision": PURE, "fp8_lm": BETAS | PLAIN},
    "gradient fp8": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"gradient": "fp8"}},
    "first moment fp8": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"first_moment": "fp8"}},
    "second moment fp8": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"second_moment": "fp8"}},
    "second moment fp8_e5m2": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"second_moment": "fp8_e5m2"}},
    "second moment fp16": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"second_moment": "fp16"}},
    "master fp16": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"master": "fp16"}},
    "master fp8": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"master": "fp8"}},
    "adamw_8bit": _mixed("adamw_8bit", **BETAS),
    "adamw_4bit": _mixed("adamw_4bit", **BETAS),
    "adam_mini": _mixed("adam_mini", **BETAS),
    "apollo": _mixed("apollo", **BETAS, rank=16),
    "adafactor": _mixed("adafactor"),
    "lion": _mixed("lion"),
    "sgd, momentum": _mixed("sgd", momentum=0.9),
}
"""The reference, FP8-LM whole, each of its precisions lowered alone (the rest in fp32), and other small states."""


def recipe_of(variant: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Return the recipe of one training; the model's shape is written into `folder`."""
    return {
        "model": scratch(folder),
        "data": {"source": "stdlib", "max_length": 128, "max_records": 400, "validation_fraction": 0.05},
        "objective": "pretrain",
        "methods": {"packing": {"row_tokens": 256}, "attention": {"kind": "sdpa"}, **VARIANTS[variant]},
        "batch": {"documents": 8, "micro_batch_size": 4},
        "training": {"steps": steps, "learning_rate": 4e-3, "spike": None},
        "evaluation": {"every": steps, "max_documents": 40, "keep_best": False},
        "seed": seed,
    }


def train(variant: str, seed: int, steps: int) -> dict[str, float]:
    """Train one variant and return its figures."""
    with tempfile.TemporaryDirectory() as name:
        return figures_of(recipe_of(variant, seed, steps, Path(name)))


def bytes_of(variant: str) -> dict[str, float]:
    """Return bytes a parameter of the gradients, of each part of the state and of the weights, counted on tensors."""
    with tempfile.TemporaryDirectory() as name:
        run = assemble(plan_of(recipe_of(variant, 0, 1, Path(name))))
    optimizer = run.make_optimizer(parameter_groups(run))
    count = sum(parameter.numel() for _, parameter in run.trainable())
    sum((parameter.float() ** 2).sum() for _, parameter in run.trainable()).backward()  # type: ignore[union-attr]
    found = {"gradient": _gradient_bytes(run, optimizer)}
    optimizer.step()
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                part = key.removesuffix("_scale")
                found[part] = found.get(part, 0) + value.nbytes
    weights = sum(parameter.nbytes for _, parameter in run.trainable())
    found["computed with" if "master" in found else "master"] = weights
    return {part: round(size / count, 3) for part, size in found.items()}


def state_bytes(parts: dict[str, float]) -> float:
    """Return the bytes a parameter of the moments alone."""
    others = ("gradient", "master", "computed with")
    return sum(size for part, size in parts.items() if part not in others)


def _gradient_bytes(run: Run, optimizer: torch.optim.Optimizer) -> int:
    stored = stored_gradients_of(optimizer)
    if stored is not None:
        return sum(tensor.nbytes for tensor in stored.tensors())
    return sum(parameter.grad.nbytes for _, parameter in run.trainable() if parameter.grad is not None)
