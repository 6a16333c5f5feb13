"""One training run from its first step to its folder: what is evaluated, kept, stopped, recorded and restored."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.unit.tiny_runs import (
    assert_same_end,
    events,
    last_state,
    recipe_over,
    save_model,
    train_with_loss,
    write_records,
)
from tunewise import api
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.run_folder import read_metrics
from tunewise.engine.schedule import learning_rate_factor
from tunewise.errors import InputError, TrainingDiverged
from tunewise.layers import native
from tunewise.methods.method import Run
from tunewise.methods.reading import load_recipe
from tunewise.workload.batches import MicroBatch

Change = Callable[[Run, MicroBatch, Tensor], Tensor]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("workload")
    return save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=44)


def unchanged(run: Run, batch: MicroBatch, loss: Tensor) -> Tensor:
    return loss


def plus(amount: float, step: int, out: Path) -> Change:
    """Add `amount` to the loss of each supervised token in step `step` (the first is 1)."""

    def change(run: Run, batch: MicroBatch, loss: Tensor) -> Tensor:
        is_now = run.model.training and len(events(out, "step")) == step - 1
        return loss + amount * batch.num_supervised if is_now else loss

    return change


def test_the_loss_falls_and_the_run_folder_can_be_read(files: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    training = {"steps": 12, "learning_rate": 3e-2, "schedule": "constant"}
    recipe = recipe_over(*files, training=training, evaluation={"every": 4})
    result = api.train(recipe, out=tmp_path / "run", observe=seen.append)
    outcome = result.outcome
    assert (outcome.steps, outcome.reason) == (12, "all steps done")
    assert outcome.first_loss is not None
    assert outcome.best_loss is not None
    assert outcome.best_loss < outcome.first_loss - 1.0
    assert outcome.first_loss == pytest.approx(math.log(4096), rel=0.2), "a random model knows nothing"
    assert outcome.peak_memory_bytes > 100 * 2**20

    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        ".lock",
        "adapter",
        "checkpoints",
        "data.json",
        "metrics.jsonl",
        "recipe.yaml",
        "versions.json",
    }
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["torch"].startswith(torch.__version__[:3])
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == seen, "who watches sees what is written"
    steps = events(tmp_path / "run", "step")
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert sum(entry["tokens"] for entry in steps) == outcome.tokens
    assert sum(entry["supervised_tokens"] for entry in steps) == outcome.supervised_tokens
    assert [entry["step"] for entry in events(tmp_path / "run", "evaluation")] == [0, 4, 8, 12]
    assert seen[-1]["event"] == "finished"
    assert {entry["event"] for entry in seen} >= {"note", "saved", "checkpoint"}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd", "inverse_sqrt"])
def test_the_learning_rate_follows_its_schedule(schedule: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    training = {"schedule": schedule, "warmup": 2, "final_learning_rate": 0.1}
    result = api.train(recipe_over(*files, training=training), out=tmp_path / "run")
    rates = [entry["learning_rate"] for entry in events(tmp_path / "run", "step")]
    spec = result.recipe.training
    assert rates == [5e-3 * learning_rate_factor(spec, step, 6) for step in range(6)]
    assert rates[0] < rates[1] < rates[2]


def validation_losses(*losses: float) -> Change:
    """Let the evaluations come out like this, one after the other."""
    evaluations = itertools.count()
    present = [math.nan]

    def change(run: Run, batch: MicroBatch, loss: Tensor) -> Tensor:
        if run.model.training:
            return loss
        if 0 in batch.documents:
            present[0] = losses[next(evaluations)]
        return torch.full((), present[0] * batch.num_supervised)

    return change


def one_evaluation_batch(files: tuple[Path, Path], **changes: Any) -> dict[str, Any]:
    evaluation = {"every": 1, "micro_batch_size": 100, **changes.pop("evaluation", {})}
    return recipe_over(*files, evaluation=evaluation, methods={"lora": {"rank": 4, "dropout": 0.1}}, **changes)


def test_the_best_state_is_restored(files: tuple[Path, Path], tmp_path: Path) -> None:
    losses = (9.0, 5.0, 4.0, 2.0, 6.0, 7.0, 8.0)
    recipe = one_evaluation_batch(files)
    outcome = train_with_loss(recipe, tmp_path / "run", validation_losses(*losses))
    assert (outcome.first_loss, outcome.best_loss, outcome.best_step, outcome.steps) == (9.0, 2.0, 3, 6)
    checkpoints = dict(list_checkpoints(tmp_path / "run" / "checkpoints"))
    assert sorted(checkpoints) == [3, 4, 6], "the newest two, and the best besides"
    best, _ = load_checkpoint(checkpoints[3])
    last, _ = load_checkpoint(checkpoints[6])
    kept = {name for name in best if name.startswith("trainable/")}
    assert kept
    assert not any(torch.equal(best[name], last[name]) for name in kept if "lora_B" in name)


@pytest.mark.parametrize("keep_best", [True, False])
def test_what_is_saved_is_the_best_state(keep_best: bool, files: tuple[Path, Path], tmp_path: Path) -> None:
    """Validation data of another kind than the training data: full fine-tuning soon makes them less likely."""
    other = tmp_path / "other.jsonl"
    code = ["def f(x): return x", "import os", "while True: pass"]
    other.write_text("".join(json.dumps({"prompt": f"Tell {line}", "completion": line}) + "\n" for line in code))
    recipe = recipe_over(
        *files,
        methods={},
        data={"validation": str(other)},
        training={"learning_rate": 0.1, "spike": None, "schedule": "constant"},
        evaluation={"every": 1, "keep_best": keep_best},
    )
    result = api.train(recipe, out=tmp_path / "run")
    assert result.outcome.best_step is not None
    assert 1 <= result.outcome.best_step < 4, "this data is made to overfit at once"
    step = result.outcome.best_step if keep_best else 6
    merged = api.export_merged(tmp_path / "run", tmp_path / "merged")
    tensors, _ = load_checkpoint(dict(list_checkpoints(tmp_path / "run" / "checkpoints"))[step])
    for folder in (result.saved.folder, merged.folder):
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == {name.removeprefix("trainable/") for name in tensors if name.startswith("trainable/")}
        assert all(torch.equal(tensor, tensors[f"trainable/{name}"]) for name, tensor in saved.items())


def test_the_untrained_state_is_no_result(files: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = train_with_loss(
        one_evaluation_batch(files), tmp_path / "run", validation_losses(1.0, 7.0, 6.0, 8.0, 9.0, 9.0, 9.0)
    )
    assert (outcome.first_loss, outcome.best_loss, outcome.best_step) == (1.0, 6.0, 2)


def test_patience_stops_early(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = one_evaluation_batch(files, evaluation={"patience": 2})
    outcome = train_with_loss(recipe, tmp_path / "run", validation_losses(9.0, 5.0, 6.0, 4.0, 5.0, 4.5))
    assert (outcome.steps, outcome.best_step) == (5, 3)
    assert outcome.reason == "no better validation loss for 2 evaluations"
    assert len(events(tmp_path / "run", "step")) == 5
    _, state = last_state(tmp_path / "run")
    assert state["progress"]["finished"] == outcome.reason


def test_without_validation_the_last_state_stays(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = api.train(recipe_over(*files, data={"validation_fraction": 0}), out=tmp_path / "run")
    assert (result.outcome.first_loss, result.outcome.best_loss, result.outcome.best_step) == (None, None, None)
    assert events(tmp_path / "run", "evaluation") == []
    assert result.saved.folder.is_dir()


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_checkpoints_are_kept(keep: int, files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(*files, checkpoints={"every": 1, "keep": keep}, evaluation={"keep_best": False})
    api.train(recipe, out=tmp_path / "run")
    steps = [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert steps == list(range(7 - keep, 7))


@pytest.mark.parametrize(
    ("amount", "reason"),
    [(math.nan, "the loss is nan"), (math.inf, "the loss is inf"), (5.0, r"the loss jumped from about \d\.\d+ to")],
)
def test_a_bad_loss_stops_before_the_update(
    amount: float, reason: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = recipe_over(*files, methods={"lora": {"rank": 4, "dropout": 0.2}}, checkpoints={"every": 6})
    run = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=f"step 4: {reason}") as caught:
        train_with_loss(recipe, run, plus(amount, 4, run))
    assert caught.value.exit_code == 3
    assert "lower training.learning_rate" in str(caught.value).lower()

    written = json.loads((run / "diverged-step-00000004.json").read_text())
    assert written["step"] == 4
    assert len(written["documents"]) == 6
    lines = {f"{files[1].name}:{number}" for number in range(1, 45)}
    assert all(document["origin"] in lines for document in written["documents"])
    assert all(document["num_tokens"] > 1 for document in written["documents"])
    assert events(run, "diverged")[0]["batch"] == "diverged-step-00000004.json"

    assert list_checkpoints(run / "checkpoints")[-1][0] == 3, "the state of the step before is saved"
    train_with_loss(recipe, run, unchanged, resume=True)
    train_with_loss(recipe, tmp_path / "whole", unchanged)
    assert_same_end(tmp_path / "whole", run)


def test_a_jump_is_allowed_where_the_recipe_allows_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(*files, training={"spike": None})
    outcome = train_with_loss(recipe, tmp_path / "run", plus(50.0, 4, tmp_path / "run"))
    assert outcome.steps == 6


def test_a_bad_gradient_stops_too(files: tuple[Path, Path], tmp_path: Path) -> None:
    def change(run: Run, batch: MicroBatch, loss: Tensor) -> Tensor:
        return loss + 0.0 * torch.sqrt(loss * 0.0) if run.model.training else loss  # its derivative is 0 * inf

    with pytest.raises(TrainingDiverged, match="step 1: the gradient's norm is nan"):
        train_with_loss(recipe_over(*files), tmp_path / "run", change)


def test_a_validation_loss_that_is_no_number_stops(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="The validation loss after step 2 is nan"):
        train_with_loss(one_evaluation_batch(files), tmp_path / "run", validation_losses(9.0, 8.0, math.nan))
    assert [entry["step"] for entry in events(tmp_path / "run", "evaluation")] == [0, 1]


def test_the_written_recipe_trains_to_the_same_bits(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = files
    short = {"model": {"name": str(model), "tokenizer": "embedded"}, "data": str(data), "training": {"epochs": 0.5}}
    first = api.train(short, out=tmp_path / "first")
    written = yaml.safe_load((tmp_path / "first" / "recipe.yaml").read_text())
    kernels = ["fused"] if native.why_not() is None else []
    slots = ["packing", "lora", "precision", "attention", "supervised_loss", "adamw"]
    assert list(written["methods"]) == slots + kernels
    left_open = {
        f"{section}.{key}"
        for section in ("data", "batch", "training", "evaluation", "checkpoints")
        for key, value in written[section].items()
        if value is None
    }
    assert left_open == {
        "data.validation",  # split off
        "data.system_prompt",
        "data.max_records",
        "data.replay",  # nothing is mixed in
        "data.abstain",
        "batch.supervised_tokens",  # documents fix the batch
        "batch.gradient_accumulation_steps",  # follows from documents and the micro-batch
        "training.steps",  # epochs fix the end
        "training.tokens",
        "evaluation.patience",
        "evaluation.micro_batch_size",  # as in training
        "evaluation.general_text",  # nobody measures it
        "evaluation.forgetting_budget",
    }
    assert load_recipe(tmp_path / "first" / "recipe.yaml") == first.recipe
    api.train(tmp_path / "first" / "recipe.yaml", out=tmp_path / "second")
    assert_same_end(tmp_path / "first", tmp_path / "second")


def test_two_processes_cannot_train_in_one_folder(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, out = recipe_over(*files), tmp_path / "run"
    refused: list[str] = []

    def observe(entry: dict[str, Any]) -> None:
        if entry["event"] == "step" and not refused:
            with pytest.raises(InputError, match="Another process is training in") as caught:
                api.resume(out)
            refused.append(str(caught.value))

    api.train(recipe, out=out, observe=observe)
    assert len(refused) == 1


def test_a_half_line_of_metrics_is_cut_off(files: tuple[Path, Path], tmp_path: Path) -> None:
    api.train(recipe_over(*files, training={"steps": 2}), out=tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"event": "step", "st')
    api.resume(tmp_path / "run")
    assert metrics.read_text().startswith(whole)
    assert len(read_metrics(metrics)) > whole.count("\n")
