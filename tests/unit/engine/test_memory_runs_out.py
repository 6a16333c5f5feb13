"""Memory that runs out makes the layout smaller and changes nothing else: same documents, schedule and weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.tiny_runs import (
    events,
    last_state,
    recipe_over,
    relative_error,
    save_model,
    train_with_loss,
    write_records,
)
from tunewise.engine.train import Outcome
from tunewise.errors import DoesNotFit
from tunewise.methods.method import Run
from tunewise.workload.batches import MicroBatch

Fits = Callable[[Run, MicroBatch], bool]

CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB"
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError(CUDA_MESSAGE),
    "cpu": lambda: RuntimeError(CPU_MESSAGE),
    "python": lambda: MemoryError(),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("workload")
    return save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=44)


def never(run: Run, batch: MicroBatch) -> bool:
    return False


def train(recipe: dict[str, Any], out: Path, fits: Fits, error: str = "cpu", *, resume: bool = False) -> Outcome:
    """Train on a machine whose memory holds only micro-batches that fit."""

    def change(run: Run, batch: MicroBatch, loss: Tensor) -> Tensor:
        if not fits(run, batch):
            raise ERRORS[error]()
        return loss

    return train_with_loss(recipe, out, change, resume=resume)


def rows_at_most(number: int) -> Fits:
    """Training fits with so many rows, evaluation always."""
    return lambda run, batch: not run.model.training or len(batch.input_ids_RL) <= number


def assert_same_learning(one: Path, other: Path) -> None:
    """The same steps in the same order with the same rates, and the same weights but for rounding."""
    steps, other_steps = events(one, "step"), events(other, "step")
    for name in ("step", "epoch", "learning_rate", "tokens", "supervised_tokens"):
        assert [entry[name] for entry in steps] == [entry[name] for entry in other_steps]
    assert [e["loss"] for e in steps] == pytest.approx([e["loss"] for e in other_steps], rel=1e-5)
    (tensors, _), (other_tensors, _) = last_state(one), last_state(other)
    for name, tensor in tensors.items():
        if name.startswith("trainable/"):
            assert relative_error(tensor, other_tensors[name]) < 1e-5, name


SGD: dict[str, Any] = {"sgd": {"momentum": 0.9}, "precision": {"compute": "fp32"}}
"""Adam divides by the root of a tiny second moment, which makes rounding visible; momentum does not."""


@pytest.mark.parametrize("error", ERRORS)
def test_the_micro_batch_is_halved_and_the_global_batch_stays(
    error: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = recipe_over(*files, methods={"lora": {"rank": 4}, **SGD}, batch={"documents": 8, "micro_batch_size": 8})
    train(recipe, tmp_path / "shrunk", rows_at_most(2), error)
    recipe["batch"]["micro_batch_size"] = 2
    train(recipe, tmp_path / "small", lambda run, batch: True)
    assert_same_learning(tmp_path / "shrunk", tmp_path / "small")
    found = events(tmp_path / "shrunk", "out_of_memory")
    assert [(e["moment"], e["step"], e["micro_batch_size"], e["row_tokens"]) for e in found] == [
        ("training", 0, 4, None),
        ("training", 0, 2, None),
    ]
    said = {"cuda": CUDA_MESSAGE, "cpu": CPU_MESSAGE, "python": "MemoryError"}[error]
    assert {entry["message"] for entry in found} == {said}


def test_packed_rows_become_shorter_when_one_row_is_too_much(files: tuple[Path, Path], tmp_path: Path) -> None:
    methods = {"lora": {"rank": 4}, "packing": {"row_tokens": 160, "pad_to": 1}, **SGD}
    recipe = recipe_over(*files, methods=methods)
    train(recipe, tmp_path / "shrunk", lambda run, batch: not run.model.training or batch.input_ids_RL.numel() <= 50)
    sizes = [(e["micro_batch_size"], e["row_tokens"]) for e in events(tmp_path / "shrunk", "out_of_memory")]
    assert sizes == [(1, 160), (1, 80), (1, 44)], "the longest document of the step has 44 tokens"
    recipe["methods"]["packing"]["row_tokens"] = 44
    recipe["batch"]["micro_batch_size"] = 1
    train(recipe, tmp_path / "small", lambda run, batch: True)
    assert_same_learning(tmp_path / "shrunk", tmp_path / "small")


def test_dropout_draws_the_same_numbers_in_the_second_try(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Memory runs out in the second micro-batch of a step, after the first has drawn its dropout."""
    recipe = recipe_over(*files, methods={"lora": {"rank": 4, "dropout": 0.3}, **SGD}, batch={"micro_batch_size": 4})
    calls = itertools.count(1)

    def fits(run: Run, batch: MicroBatch) -> bool:
        return not run.model.training or next(calls) != 2

    train(recipe, tmp_path / "shrunk", fits)
    assert len(events(tmp_path / "shrunk", "out_of_memory")) == 1
    recipe["batch"]["micro_batch_size"] = 2
    train(recipe, tmp_path / "small", lambda run, batch: True)
    (tensors, state), (other_tensors, other_state) = last_state(tmp_path / "shrunk"), last_state(tmp_path / "small")
    assert state["optimizer"] == other_state["optimizer"]
    assert all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())


def test_a_resumed_run_keeps_the_smaller_layout(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(*files, methods={"lora": {"rank": 4, "dropout": 0.2}, "packing": {"row_tokens": 96}})
    train(recipe, tmp_path / "whole", rows_at_most(1))

    def dies(run: Run, batch: MicroBatch) -> bool:
        if run.model.training and len(events(tmp_path / "killed", "step")) == 3:
            raise KeyboardInterrupt
        return rows_at_most(1)(run, batch)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "killed", dies)
    train(recipe, tmp_path / "killed", rows_at_most(1), resume=True)
    (tensors, state), (other_tensors, other_state) = last_state(tmp_path / "whole"), last_state(tmp_path / "killed")
    assert state == other_state
    assert state["progress"]["micro_batch_size"] == 1
    assert all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())
    assert len(events(tmp_path / "killed", "out_of_memory")) == 1, "the resumed run knows what fits"


def test_evaluation_shrinks_by_itself(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(*files, methods={"lora": {"rank": 4}, **SGD}, evaluation={"micro_batch_size": 4})
    train(recipe, tmp_path / "shrunk", lambda run, batch: run.model.training or len(batch.input_ids_RL) == 1)
    whole = train(recipe, tmp_path / "whole", lambda run, batch: True)
    found = events(tmp_path / "shrunk", "out_of_memory")
    assert [(e["moment"], e["micro_batch_size"]) for e in found] == [("evaluation", 2), ("evaluation", 1)]
    losses = [entry["validation_loss"] for entry in events(tmp_path / "shrunk", "evaluation")]
    assert losses == pytest.approx([e["validation_loss"] for e in events(tmp_path / "whole", "evaluation")], rel=1e-5)
    assert whole.best_loss == pytest.approx(min(losses[1:]), rel=1e-5)
    (tensors, state), (other_tensors, _) = last_state(tmp_path / "shrunk"), last_state(tmp_path / "whole")
    assert state["progress"]["micro_batch_size"] == 2, "training's layout is not touched"
    assert state["progress"]["evaluation_micro_batch_size"] == 1
    assert all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("is_training", [True, False])
def test_stop_is_a_wish(is_training: bool, files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(*files, training={"oom": "stop"})
    moment = "training" if is_training else "evaluation"
    with pytest.raises(DoesNotFit, match=f"Out of memory in {moment} at micro_batch_size 2: .*can't allocate"):
        train(recipe, tmp_path / "run", lambda run, batch: run.model.training != is_training)
    assert events(tmp_path / "run", "out_of_memory") == []


@pytest.mark.parametrize("methods", [{}, {"packing": {"row_tokens": 96}}])
def test_when_nothing_is_left_to_split_it_does_not_fit(
    methods: dict[str, Any], files: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = recipe_over(*files, methods={"lora": {"rank": 4}, **methods})
    with pytest.raises(DoesNotFit, match=r"one row of \d+ tokens: .*\n  What would help: .*checkpointing"):
        train(recipe, tmp_path / "run", never)


def test_updates_in_backward_cannot_be_repeated(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(
        *files,
        methods={"sgd": {"in_backward": True}},
        training={"max_grad_norm": None},
        batch={"documents": 4, "micro_batch_size": 4},
    )
    with pytest.raises(DoesNotFit, match="in training at micro_batch_size 4"):
        train(recipe, tmp_path / "run", rows_at_most(2))
    outcome = train(recipe, tmp_path / "other", lambda run, batch: run.model.training or len(batch.input_ids_RL) <= 2)
    assert outcome.steps == 6, "evaluation updates nothing"


def test_another_error_is_not_taken_for_memory(files: tuple[Path, Path], tmp_path: Path) -> None:
    def fits(run: Run, batch: MicroBatch) -> bool:
        raise RuntimeError("shape '[3, 4]' is invalid for input of size 7")

    with pytest.raises(RuntimeError, match="is invalid for input"):
        train(recipe_over(*files), tmp_path / "run", fits)
