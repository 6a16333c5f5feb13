"""The Python API: `tunewise.train(recipe)`, with the same words as the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import tunewise
from tests.unit.tiny_runs import digest, logits, recipe_over, relative_error, save_model, write_records
from tunewise import api
from tunewise.engine.assemble import Plan
from tunewise.methods.reading import recipe_from_mapping


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("workload")
    return save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=30)


@pytest.fixture
def recipe(files: tuple[Path, Path]) -> dict[str, Any]:
    return recipe_over(*files, training={"steps": 2})


def test_a_mapping_a_recipe_and_a_file_train_the_same(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    forms: dict[str, Any] = {"mapping": recipe, "value": recipe_from_mapping(recipe), "path": file, "text": str(file)}
    adapters = set()
    for name, form in forms.items():
        result = tunewise.train(form, out=tmp_path / name)
        assert isinstance(result, tunewise.Result)
        assert (result.folder, result.saved.folder) == (tmp_path / name, tmp_path / name / "adapter")
        assert result.recipe.training.steps == result.outcome.steps == 2
        adapters.add(digest(result.saved.folder / "adapter_model.safetensors"))
    assert len(adapters) == 1


def test_the_adapter_is_what_was_trained(recipe: dict[str, Any], files: tuple[Path, Path], tmp_path: Path) -> None:
    result = tunewise.train(recipe, out=tmp_path / "run")
    merged = tunewise.export_merged(result.folder, tmp_path / "merged")
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files[0]), str(result.saved.folder))
    one = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    assert relative_error(logits(one), logits(adapted)) < 1e-5


def test_without_out_runs_get_names_of_their_own(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [tunewise.train(recipe).folder for _ in range(2)]
    assert folders == [Path("runs/records"), Path("runs/records-2")]
    recipe["out"] = "elsewhere"
    assert tunewise.train(recipe).folder == Path("elsewhere")
    assert tunewise.train(recipe, out="argument").folder == Path("argument")


def test_a_run_is_never_overwritten(recipe: dict[str, Any], tmp_path: Path) -> None:
    tunewise.train(recipe, out=tmp_path / "run")
    before = digest(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(tunewise.InputError, match=r"already holds a run\. Continue it with: tunewise train --resume"):
        tunewise.train(recipe, out=tmp_path / "run")
    assert digest(tmp_path / "run" / "metrics.jsonl") == before
    (tmp_path / "file").touch()
    with pytest.raises(tunewise.InputError, match="is a file"):
        tunewise.train(recipe, out=tmp_path / "file")


def test_what_will_be_done_is_announced_before_it_is_done(recipe: dict[str, Any], tmp_path: Path) -> None:
    seen: list[str] = []

    def announce(plan: Plan, folder: Path) -> None:
        seen.append("announced")
        assert (plan.num_steps, folder) == (2, tmp_path / "run")
        assert plan.recipe.batch.micro_batch_size == 2
        assert not folder.exists()

    tunewise.train(recipe, out=tmp_path / "run", observe=lambda entry: seen.append(entry["event"]), announce=announce)
    assert seen[0] == "announced"
    assert seen.count("step") == 2
    assert seen[-1] == "finished"


def test_what_cannot_work_leaves_no_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["methods"] = {"quantize": {"kind": "nf4"}}
    with pytest.raises(tunewise.Conflict, match="full fine-tuning cannot train them"):
        tunewise.train(recipe, out=tmp_path / "run")
    recipe["methods"] = {"lora": {"target_modules": ["no_such_layer"]}}
    with pytest.raises(tunewise.InputError, match="no_such_layer"):
        tunewise.train(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    recipe["methods"] = {"lora": {"rank": 2}}
    assert tunewise.train(recipe, out=tmp_path / "run").outcome.steps == 2


def test_every_public_name_is_there() -> None:
    assert set(tunewise.__all__) == set(tunewise._HOMES)
    for name in tunewise.__all__:
        assert getattr(tunewise, name).__name__ == name
    assert tunewise.train is api.train
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = tunewise.trian


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, tunewise; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
