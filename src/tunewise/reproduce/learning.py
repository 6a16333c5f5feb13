"""Train one arm of an experiment by tunewise's own loop, in memory: no checkpoint, no export, no gate.

    losses = bench.once("lora r8 seed 0", lambda: learn(mapping, seed=0).loss)

What an arm learns from is prepared once for all arms that share it.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.train import Training
from tunewise.errors import Interrupted, TrainingDiverged
from tunewise.methods.method import Run
from tunewise.methods.precision import default_compute
from tunewise.methods.reading import recipe_from_mapping
from tunewise.quality.losses import DocumentLosses, document_losses
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.timing import clock
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import EMBEDDED_FOLDER
from tunewise.workload.prepare import Prepared

FAST: dict[str, Any] = {"precision": {"compute": default_compute(torch.device("cpu"))}, "packing": {"row_tokens": 512}}
"""Methods that make an arm fast on a CPU and change nothing that is compared between arms."""

FUSED: dict[str, Any] = {"fused": {}}
"""The compiled CPU kernels, where an arm's methods go with them."""

Arm = Callable[[int], dict[str, Any]]
"""From a seed to a recipe."""

_prepared: dict[str, Prepared] = {}


@dataclass(frozen=True, eq=False)
class Learnt:
    """A finished arm.

    Attributes:
        run: with the trained weights.
        plan: the complete recipe and the data.
        first_loss, loss: validation losses before and after, nats per supervised token.
        best_loss: the lowest of all evaluations after a step.
        train_loss: mean over all supervised tokens of the losses with which they were met.
        validation_losses: of every evaluation.
        num_trained: trainable parameters.
        seconds: of the training loop.
        diverged: why training was given up, or empty; `loss` is then that of the last evaluation.
    """

    run: Run
    plan: Plan
    first_loss: float
    loss: float
    best_loss: float
    train_loss: float
    validation_losses: list[float]
    num_trained: int
    seconds: float
    diverged: str


def learn(
    mapping: dict[str, Any],
    *,
    change: Callable[[Run], None] = lambda run: None,
    watch: Callable[[Run, dict[str, Any]], None] = lambda run, entry: None,
) -> Learnt:
    """Train as the recipe in `mapping` says.

    Args:
        mapping: a recipe as plain data; "device" is the CPU where nothing else is said.
        change: does something to the run before its first step, that no recipe can say.
        watch: called with every line of the training's record.

    Raises:
        Interrupted: a signal asked for a stop.
    """
    kept_nowhere = {**mapping.get("evaluation", {}), "keep_best": False}  # so the last state counts, not the best
    plan = plan_of({**mapping, "evaluation": kept_nowhere})
    run = assemble(plan)
    change(run)
    met: list[tuple[float, int]] = []  # of each step; a plain mean of its losses would favour steps of few tokens
    evaluations: list[float] = []

    def observe(entry: dict[str, Any]) -> None:
        if entry["event"] == "step":
            met.append((entry["loss"], entry["supervised_tokens"]))
        if entry["event"] == "evaluation":
            evaluations.append(entry["validation_loss"])
        watch(run, entry)

    diverged, seconds = "", 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")
        folder.open()
        try:
            data = plan.data
            training = Training(
                run, data.train, data.validation, plan.num_steps, folder, observe, general=data.general, saves=False
            )
            started = clock()
            training.run()
            seconds = clock() - started
        except TrainingDiverged as error:
            diverged = str(error).splitlines()[0]
        except Interrupted as stop:
            number = stop.exit_code - 128
            raise Interrupted(number, "Stopped; what is finished is kept, and the same command goes on.") from None
        finally:
            folder.close()
    last = evaluations or [float("inf")]
    train_loss = sum(loss * tokens for loss, tokens in met) / max(1, sum(tokens for _, tokens in met))
    return Learnt(
        run, plan, last[0], last[-1], min(last[1:], default=last[0]), train_loss, evaluations,
        sum(parameter.numel() for _, parameter in run.trainable()), seconds, diverged,
    )  # fmt: skip


def plan_of(mapping: dict[str, Any]) -> Plan:
    """Settle a recipe; its data are prepared once for all recipes that read, cut and split them alike."""
    recipe = recipe_from_mapping({"device": "cpu", **mapping}, "reproduction")
    given = recipe.to_mapping()
    tokens = given["model"]["tokenizer"] or given["model"]["name"]
    key = json.dumps([given["data"], given["objective"], tokens])
    key += json.dumps([given["seed"], given["evaluation"]["general_text"], given["evaluation"]["general_tokens"]])
    plan = settle(recipe, _prepared.get(key))
    _prepared[key] = plan.data
    return plan


def arm(
    methods: dict[str, Any],
    *,
    seed: int,
    steps: int,
    rate: float,
    documents: int = 8,
    data: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the recipe of an arm that fine-tunes the embedded model on functions of the standard library.

    Validation is taken before the first step and after the last.
    """
    training = {"steps": steps, "learning_rate": rate, "spike": None, **more.pop("training", {})}
    evaluation = {"every": steps, "keep_best": False, "max_documents": 32, **more.pop("evaluation", {})}
    return {
        "model": "embedded",
        "data": {"source": "stdlib", "max_records": 400, "max_length": 96, "too_long": "cut", **(data or {})},
        "methods": {**FAST, **methods},
        "batch": {"documents": documents, "micro_batch_size": 4},
        "training": training,
        "evaluation": evaluation,
        "seed": seed,
        **more,
    }


def scratch(folder: Path, *, hidden_size: int = 64, num_hidden_layers: int = 4) -> dict[str, Any]:
    """Write the shape of a small Llama into `folder`, and return the `model` part of a recipe: random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        vocab_size=4096, hidden_size=hidden_size, intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_hidden_layers, num_attention_heads=max(1, hidden_size // 16),
        num_key_value_heads=max(1, hidden_size // 32), max_position_embeddings=512, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return {"name": str(folder / "config.json"), "weights": "random", "tokenizer": str(EMBEDDED_FOLDER)}


def held_out(learnt: Learnt, corpus: Corpus | None = None, most: int = 200) -> DocumentLosses:
    """Return the losses of single held-out documents, for intervals over documents."""
    chosen = learnt.plan.data.validation if corpus is None else corpus
    return document_losses(learnt.run, chosen, range(min(len(chosen), most)))


def differences(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return one - other, pair by pair (the same seed on both sides)."""
    return [one - other for one, other in zip(ones, others, strict=True)]


def ratios(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return one / other, pair by pair."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def rounded(values: Sequence[float], digits: int = 4) -> list[float]:
    """Return the values rounded for a table."""
    return [round(float(value), digits) for value in values]


def same_draws(seed: int) -> torch.Generator:
    """Return a generator of this seed, apart from torch's global one."""
    return torch.Generator().manual_seed(seed)


def over_seeds(bench: Bench, arms: Mapping[str, Arm], *, seeds: int) -> dict[str, list[dict[str, float]]]:
    """Train every arm with every seed, seed by seed, and return the figures that are kept of each.

    Args:
        bench: keeps every finished training.
        arms: from a name to a function of the seed that gives the arm's recipe.
        seeds: how many.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for seed in range(seeds):
        for name, recipe in arms.items():
            found[name].append(bench.once(f"{name}, seed {seed}", figures_of, recipe(seed)))
    return found


def figures_of(mapping: dict[str, Any]) -> dict[str, float]:
    """Train and return what tables and findings need: losses, trainable parameters, seconds and tokens."""
    learnt = learn(mapping)
    return {
        "first": learnt.first_loss,
        "loss": learnt.loss,
        "train": learnt.train_loss,
        "trained": float(learnt.num_trained),
        "seconds": learnt.seconds,
        "diverged": float(bool(learnt.diverged)),
    }


def column(rows: Sequence[Mapping[str, float]], key: str = "loss") -> list[float]:
    """Return one figure of every seed."""
    return [row[key] for row in rows]


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return math.fsum(values) / len(values)
