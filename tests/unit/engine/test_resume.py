"""The law of resuming: killed at any step and resumed equals never killed, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.unit.tiny_runs import assert_same_end, events, recipe_over, save_model, write_records
from tunewise import api
from tunewise.cli import main
from tunewise.engine.checkpoint import list_checkpoints, save_checkpoint
from tunewise.engine.train import Observe
from tunewise.errors import CheckpointError, InputError, Interrupted

LORA = {"rank": 4, "dropout": 0.2}
CPU_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adagrad": {},
    "rmsprop": {"momentum": 0.5, "nesterov": True},
    "adam": {},
    "adamw": {},
    "adamw_8bit": {},
    "adafactor": {},
    "lion": {},
    "adamw_4bit": {},
    "adam_mini": {},
    "apollo": {"rank": 2, "update_every": 2},
    "fp8_lm": {},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "padded": {"methods": {"lora": LORA}},
    "fp16 with loss scaling": {"methods": {"lora": LORA, "precision": {"compute": "fp16"}}},
    "bf16": {"methods": {"lora": LORA, "packing": None, "precision": {"compute": "bf16"}}},
    "full, bf16 masters": {"methods": {"precision": {"compute": "bf16"}}},
    "in backward": {
        "methods": {"adamw": {"in_backward": True}},
        "training": {"max_grad_norm": None},
        "batch": {"documents": 4, "micro_batch_size": 4},
    },
    "checkpointing": {"methods": {"lora": LORA, "checkpointing": None}},
    "streamed, activations on disk": {
        "methods": {"lora": LORA, "checkpointing": None, "stream": None, "offload_activations": {"min_bytes": 1}}
    },
    "nf4": {"methods": {"lora": LORA, "quantize": {"kind": "nf4"}}},
    "peft": {"methods": {"peft": {"kind": "IA3"}}},
    "LoRA+": {"methods": {"lora": {**LORA, "lora_plus_ratio": 8.0}}, "training": {"weight_decay": 0.1}},
    "best is not last": {"methods": {"lora": LORA}, "training": {"learning_rate": 0.3}, "evaluation": {"every": 1}},
    "tokens, wsd": {
        "methods": {"lora": LORA},
        "batch": {"documents": None, "supervised_tokens": 70},
        "training": {"steps": None, "tokens": 400, "schedule": "wsd"},
    },
    "kl to base": {"methods": {"lora": LORA, "kl_to_base": {"beta": 0.5}}},
    "l2_sp": {"methods": {"lora": LORA, "l2_sp": {"strength": 2.0}}},
    "l2_sp, full": {"methods": {"l2_sp": {"strength": 2.0}}},
    "replay and a budget": {
        "methods": {"lora": LORA},
        "data": {"replay": {"fraction": 0.2}},
        "training": {"learning_rate": 0.03},
        "evaluation": {"every": 1, "general_tokens": 64, "forgetting_budget": 5.0},
    },
    "two epochs": {"methods": {"lora": LORA}, "training": {"steps": None, "epochs": 1.5}, "batch": {"documents": 16}},
}
for optimizer, options in CPU_OPTIMIZERS.items():
    SETTINGS[optimizer] = {"methods": {"lora": LORA, "packing": {"row_tokens": 96}, optimizer: options}}


class Crash(Exception):
    """What a test raises inside a run, so that nothing is saved any more."""


def crash_at(event: str, step: int) -> Observe:
    """Return an observer that dies when `event` of `step` is recorded."""

    def observe(entry: dict[str, Any]) -> None:
        if entry["event"] == event and entry["step"] == step:
            raise Crash

    return observe


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("workload")
    # A head of 4096 x 32 has 8-bit moments; weights below 4096 numbers keep fp32 ones.
    return save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=44)


def train_with_crashes(recipe: dict[str, Any], out: Path, crashes: list[tuple[str, int]]) -> None:
    """Train, die at each of `crashes`, and go on to the end."""
    with pytest.raises(Crash):
        api.train(recipe, out=out, observe=crash_at(*crashes[0]))
    for crash in crashes[1:]:
        with pytest.raises(Crash):
            api.resume(out, observe=crash_at(*crash))
    api.resume(out)


@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_and_resumed_equals_never_killed(setting: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(*files, **SETTINGS[setting])
    whole = api.train(recipe, out=tmp_path / "whole")
    assert whole.outcome.steps >= 4
    train_with_crashes(recipe, tmp_path / "killed", [("step", 1), ("step", 3), ("checkpoint", 4)])
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    resumed = [entry["step"] for entry in events(tmp_path / "killed", "resumed")]
    assert len(resumed) == 3
    assert resumed[-1] == 4


def test_the_number_of_settings_does_not_fall() -> None:
    assert len(CPU_OPTIMIZERS) == 12
    assert len(SETTINGS) == 29


@pytest.mark.parametrize(
    "methods",
    [
        {"adamw_8bit": {}},
        {"adamw_4bit": {}},
        {"fp8_lm": {}, "precision": {"compute": "bf16", "trainable": "same"}},
    ],
    ids=lambda methods: next(iter(methods)),
)
def test_full_fine_tuning_with_small_states(methods: dict[str, Any], files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(*files, methods={"packing": {"row_tokens": 96}, **methods}, training={"steps": 4})
    api.train(recipe, out=tmp_path / "whole")
    train_with_crashes(recipe, tmp_path / "killed", [("step", 3)])
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_different_seeds_end_differently(files: tuple[Path, Path], tmp_path: Path) -> None:
    """If this comparison passed, the law above would prove nothing."""
    for seed in (1, 2):
        api.train(recipe_over(*files, seed=seed, training={"steps": 2}), out=tmp_path / str(seed))
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path / "1", tmp_path / "2")


def test_a_finished_run_resumed_stays_as_it_is(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(*files, training={"steps": 2})
    first = api.train(recipe, out=tmp_path / "run")
    again = api.resume(tmp_path / "run")
    assert again.outcome.steps == first.outcome.steps == 2
    assert again.outcome.best_loss == first.outcome.best_loss
    api.train(recipe, out=tmp_path / "other")
    assert_same_end(tmp_path / "run", tmp_path / "other")


def test_a_run_killed_before_its_first_checkpoint_begins_again(files: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_over(*files, evaluation={"keep_best": False}, checkpoints={"every": 6})
    api.train(recipe, out=tmp_path / "whole")
    train_with_crashes(recipe, tmp_path / "killed", [("step", 3)])
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_checkpoint_is_not_lost_while_another_takes_its_place(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A kill between the two renames: the old one lies aside, the new one has not got its name yet."""
    folder = tmp_path / "checkpoints"
    first = save_checkpoint(folder, 3, {}, {"number": 1})
    first.rename(folder / f".replaced-{first.name}")
    assert list_checkpoints(folder) == [(3, folder / ".replaced-step-00000003")]
    save_checkpoint(folder, 3, {}, {"number": 2})
    assert list_checkpoints(folder) == [(3, first)]
    save_checkpoint(folder, 3, {}, {"number": 3})
    assert json.loads((first / "state.json").read_text()) == {"number": 3}
    assert [path.name for path in folder.iterdir()] == [first.name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("event", ["step", "evaluation"])
def test_a_signal_saves_and_leaves(
    number: signal.Signals, event: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = recipe_over(*files, methods={"lora": LORA}, evaluation={"every": 3}, checkpoints={"every": 6})
    api.train(recipe, out=tmp_path / "whole")

    def observe(entry: dict[str, Any]) -> None:
        if entry["event"] == event and entry["step"] == 3:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"step 3 of 6.*everything is saved.*tunewise train --resume") as caught:
        api.train(recipe, out=tmp_path / "stopped", observe=observe)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == handler, "the handler of before is back"
    assert list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1][0] == 3
    api.resume(tmp_path / "stopped")
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_in_the_last_evaluation_does_not_lose_its_result(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The state of the last step is saved before it is evaluated; what the resume finds out must be saved too."""
    recipe = recipe_over(*files, methods={"lora": LORA}, evaluation={"every": 6})
    api.train(recipe, out=tmp_path / "whole")

    def observe(entry: dict[str, Any]) -> None:
        if entry["event"] == "step" and entry["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        api.train(recipe, out=tmp_path / "stopped", observe=observe)
    assert [entry["step"] for entry in events(tmp_path / "stopped", "evaluation")] == [0]
    api.resume(tmp_path / "stopped")
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_leaves_with_the_signals_code(
    number: signal.Signals, code: int, files: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = recipe_over(*files, training={"steps": 100_000}, evaluation={"every": 100_000})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    child = multiprocessing.get_context("fork").Process(target=command_line, args=(tmp_path,))
    child.start()
    while child.is_alive() and '"event": "step"' not in read(tmp_path / "run" / "metrics.jsonl"):
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join(60)
    said = read(tmp_path / "stderr")
    assert child.exitcode == code, said
    assert "everything is saved. Continue with: tunewise train --resume run" in said
    assert "Traceback" not in said
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1][0] >= 1


def command_line(folder: Path) -> None:
    """What the child does: `tunewise train recipe.yaml --out run`, in a process that has imported everything."""
    os.chdir(folder)
    sys.argv = ["tunewise", "train", "recipe.yaml", "--out", "run", "--json"]
    torch.set_num_threads(1)  # a forked child must not wait for the threads of its parent
    with open("stdout", "w") as sys.stdout, open("stderr", "w") as sys.stderr:
        main()


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


@pytest.fixture
def stopped(files: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return a run that died after step 3, over data and a model of its own."""
    model = save_model(tmp_path / "model")
    data = write_records(tmp_path / "records.jsonl")
    with pytest.raises(Crash):
        api.train(recipe_over(model, data), out=tmp_path / "run", observe=crash_at("step", 3))
    return tmp_path / "run"


def test_a_changed_recipe_is_refused(stopped: Path) -> None:
    recipe = yaml.safe_load((stopped / "recipe.yaml").read_text())
    recipe["training"]["learning_rate"] *= 2
    (stopped / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match="the recipe changed since it was started"):
        api.resume(stopped)


def test_changed_data_are_refused(stopped: Path) -> None:
    write_records(stopped.parent / "records.jsonl", seed=1)
    with pytest.raises(InputError, match="the data changed since it was started"):
        api.resume(stopped)


def test_missing_data_are_refused(stopped: Path) -> None:
    (stopped.parent / "records.jsonl").unlink()
    with pytest.raises(InputError, match=r"records\.jsonl"):
        api.resume(stopped)


def test_a_changed_model_is_refused(stopped: Path) -> None:
    save_model(stopped.parent / "model", num_hidden_layers=3)
    with pytest.raises(InputError, match="the model changed since it was started"):
        api.resume(stopped)


def test_a_folder_without_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe\.yaml"):
        api.resume(tmp_path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped: Path, tmp_path: Path) -> None:
    checkpoints = list_checkpoints(stopped / "checkpoints")
    assert len(checkpoints) >= 2
    tensors = checkpoints[-1][1] / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])
    api.resume(stopped)
    (damage,) = events(stopped, "damaged_checkpoint")
    assert "is damaged" in damage["message"]
    assert events(stopped, "resumed")[0]["step"] == checkpoints[-2][0]
    api.train(recipe_over(tmp_path / "model", tmp_path / "records.jsonl"), out=tmp_path / "whole")
    assert_same_end(tmp_path / "whole", stopped)


def test_no_intact_checkpoint_is_an_error(stopped: Path) -> None:
    for _, path in list_checkpoints(stopped / "checkpoints"):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        api.resume(stopped)
