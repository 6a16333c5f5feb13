"""`tunewise plan --export TOOL`: the file beside the recipe, what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tunewise.cli import app
from tunewise.errors import InputError
from tunewise.methods.reading import load_recipe

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4001,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A question whose answer is planned once and then comes from the cache."""
    folder = tmp_path_factory.mktemp("my-model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    machine = ["--machine", "T4", "--length", "256", "--documents", "320", "--with", "lora", "--without", "quantize"]
    return ["plan", str(folder / "config.json"), *machine]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path_factory.getbasetemp() / "export-cache"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_the_plan_is_written_for_trl(asked: list[str], tmp_path: Path) -> None:
    done = run(*asked, "--export", "trl", "--out", "plan.yaml")
    assert done.exit_code == 0, done.output
    assert "wrote plan.trl.yaml for TRL; run it with:" in done.output
    assert "trl sft --config plan.trl.yaml" in done.output
    assert "training.spike = 3.0: TRL goes on when the loss jumps" in done.output
    written, recipe = yaml.safe_load(Path("plan.trl.yaml").read_text()), load_recipe("plan.yaml")
    assert written["learning_rate"] == recipe.training.learning_rate
    tokens = 256 * (recipe.batch.documents or 0)
    step = written["per_device_train_batch_size"] * written["gradient_accumulation_steps"]
    assert tokens / written["max_length"] == pytest.approx(step, abs=1) or not written["packing"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.trl.yaml", "plan.yaml"]


def test_json_has_the_export_and_steps_are_known(asked: list[str]) -> None:
    done = run(*asked, "--export", "unsloth", "--json", "--set", "training.warmup=0.1")
    found = json.loads(done.stdout)["export"]
    name = Path(asked[1]).parent.name
    assert found["files"] == [f"{name}.unsloth.yaml"]
    assert found["command"] == f"unsloth train --config {name}.unsloth.yaml"
    assert found["mapped"]["lora.rank"] == "lora: lora_r"
    assert {"setting", "value", "reason"} == set(found["not_expressible"][0])
    assert yaml.safe_load(Path(f"{name}.unsloth.yaml").read_text())["training"]["warmup_steps"] == 6  # of 3 x 20


def test_what_is_refused_before_planning(asked: list[str]) -> None:
    for arguments, message in (
        (["--export", "trll"], "there is no tool 'trll'"),
        (["--export", "trl", "--explain", "lora"], "ask for one of them"),
    ):
        done = run(*asked, *arguments)
        assert isinstance(done.exception, InputError)
        assert message in str(done.exception)
    Path("plan.trl.yaml").write_text("mine")
    done = run(*asked, "--export", "trl", "--out", "plan.yaml")
    assert "'plan.trl.yaml' exists already" in str(done.exception)
    assert Path("plan.trl.yaml").read_text() == "mine"
    assert not Path("plan.yaml").exists()


def test_a_model_that_torchtune_cannot_build(asked: list[str]) -> None:
    done = run(*asked, "--export", "torchtune", "--json")
    assert isinstance(done.exception, InputError)
    assert "torchtune builds no 'llama' with hidden_size 512" in str(done.exception)
