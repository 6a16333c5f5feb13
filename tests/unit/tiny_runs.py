"""A tiny model folder, some records and recipes over them: what tests of the whole line train in a fraction of a
second."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.architectures import tiny_model
from tunewise.engine.assemble import assemble, settle
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.run_folder import RunFolder, read_metrics
from tunewise.engine.train import Outcome, Training
from tunewise.methods.method import Run
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.batches import MicroBatch
from tunewise.workload.model import EMBEDDED_FOLDER

TOKENIZER_SIZE = 4096
"""Tokens of the embedded tokenizer, which lies beside every tiny model here by name."""

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def save_model(folder: Path, architecture: str = "llama", shard: str | None = None, **changes: Any) -> Path:
    """Save a tiny random model of `architecture` and return its folder."""
    model = tiny_model(architecture, vocab_size=changes.pop("vocab_size", TOKENIZER_SIZE), **changes)
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    return folder


def write_records(file: Path, num_records: int = 60, seed: int = 0) -> Path:
    """Write prompts and completions of 3 to 12 words, the same for the same seed."""
    chooser = random.Random(seed)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(num_records):
            answer = " ".join(chooser.choices(WORDS, k=chooser.randint(3, 12)))
            stream.write(json.dumps({"prompt": f"Say {seed}.{number}", "completion": answer}) + "\n")
    return file


def recipe_over(model: Path, records: Path, /, **changes: Any) -> dict[str, Any]:
    """Return a recipe in fp32 on the CPU with six small steps; sections in `changes` are put into its own."""
    recipe: dict[str, Any] = {
        "model": {"name": str(model), "tokenizer": str(EMBEDDED_FOLDER)},
        "data": {"source": str(records), "validation_fraction": 0.1},
        "methods": {"lora": {"rank": 4}, "packing": {"row_tokens": 96}, "precision": {"compute": "fp32"}},
        "batch": {"documents": 6, "micro_batch_size": 2},
        "training": {"steps": 6, "learning_rate": 5e-3},
        "evaluation": {"every": 3},
        "checkpoints": {"every": 2},
        "quality": {"gate": False},  # six steps of a random model: nothing good can come of it
        "device": "cpu",
        "seed": 3,
    }
    for section, change in changes.items():
        is_inner = isinstance(change, dict) and section != "methods"
        recipe[section] = {**recipe.get(section, {}), **change} if is_inner else change
    return recipe


def train_with_loss(
    recipe: dict[str, Any], out: Path, change: Callable[[Run, MicroBatch, Tensor], Tensor], *, resume: bool = False
) -> Outcome:
    """Train (or resume) without the API, so that `change` can look at every loss, replace it or raise."""
    plan = settle(recipe_from_mapping(recipe))
    folder = RunFolder(out)
    folder.open()
    if not resume:
        folder.write_start(plan.recipe, {})
    run = assemble(plan)
    computed = run.loss
    run.loss = lambda run, batch: change(run, batch, computed(run, batch))
    training = Training(run, plan.data.train, plan.data.validation, plan.num_steps, folder, lambda entry: None)
    try:
        if resume:
            training.resume()
        return training.run()
    finally:
        folder.close()


def train_interrupted(recipe: dict[str, Any], out: Path) -> None:
    """Train, be interrupted in the eighth loss, and go on to the end."""
    seen = 0

    def stop_once(run: Run, batch: MicroBatch, loss: Tensor) -> Tensor:
        nonlocal seen
        seen += torch.is_grad_enabled()
        if seen == 8:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        train_with_loss(recipe, out, stop_once)
    train_with_loss(recipe, out, lambda run, batch, loss: loss, resume=True)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of one kind."""
    return [entry for entry in read_metrics(folder / "metrics.jsonl") if entry["event"] == kind]


def last_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and state of a run's last checkpoint, without the time spent."""
    tensors, state = load_checkpoint(list_checkpoints(folder / "checkpoints")[-1][1])
    state["progress"].pop("seconds")
    return tensors, state


def assert_same_end(one: Path, other: Path) -> None:
    """Assert that two runs ended in the same weights, optimizer, random state and progress, bit for bit."""
    (tensors, state), (other_tensors, other_state) = last_state(one), last_state(other)
    assert state == other_state
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), f"{name} differs"
    for kind in ("adapter", "model"):
        for file in sorted((one / kind).glob("*.safetensors")):
            assert digest(file) == digest(other / kind / file.name), f"{file.name} differs"


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@torch.no_grad()
def logits(model: nn.Module, vocab_size: int = TOKENIZER_SIZE) -> Tensor:
    """Return fp32 logits (L, V) of 24 fixed tokens."""
    token_ids = torch.randint(0, vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    found: Tensor = model.eval()(input_ids=token_ids, use_cache=False).logits[0].float()
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
