"""What a training saves is what it trained: for every kind of training, loaded as a user loads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.tiny_runs import events, logits, recipe_over, relative_error, save_model, write_records
from tunewise import api
from tunewise.engine.assemble import assemble, settle
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.state import restore_trainable
from tunewise.errors import VerificationError
from tunewise.export import finish
from tunewise.export.adapter import save_adapter
from tunewise.export.finish import relative_difference
from tunewise.export.result import Result
from tunewise.methods.method import Run
from tunewise.workload.model import load_config

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4}},
    "rslora with dropout": {"lora": {"rank": 4, "use_rslora": True, "dropout": 0.1}},
    "pissa": {"lora": {"rank": 4, "init": "pissa"}},
    "some layers": {"lora": {"rank": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}},
    "embeddings too": {"lora": {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "norms too": {"lora": {"rank": 4}, "freeze": {"train": ["*norm*"]}},
    "ia3": {"peft": {"kind": "IA3"}},
    "prompt tuning": {"peft": {"kind": "PROMPT_TUNING", "options": {"num_virtual_tokens": 4}}},
}
MODELS: dict[str, dict[str, Any]] = {
    "full": {},
    "norms only": {"freeze": {"train": ["*norm*"]}},
    "full in bf16 with fp32 masters": {"precision": {"compute": "bf16"}},
    "full in pure bf16": {"precision": {"compute": "bf16", "trainable": "same"}},
    "norms only in bf16": {"freeze": {"train": ["*norm*"]}, "precision": {"compute": "bf16"}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("workload")
    return save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=30)


def train(files: tuple[Path, Path], out: Path, methods: dict[str, Any], **changes: Any) -> Result:
    methods = {"precision": {"compute": "fp32"}, **methods}
    last = {"evaluation": {"every": 3, "keep_best": False}, "training": {"steps": 3, "learning_rate": 1e-2}}
    return api.train(recipe_over(*files, methods=methods, **{**last, **changes}), out=out)


def trained_run(result: Result) -> Run:
    """Rebuild the run of a result from its last checkpoint."""
    run = assemble(settle(result.recipe))
    restore_trainable(run, load_checkpoint(list_checkpoints(result.folder / "checkpoints")[-1][1])[0])
    run.documents.lengths = None
    run.model.eval()
    return run


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_load_in_peft(name: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    result = train(files, tmp_path / "run", ADAPTERS[name])
    assert (result.saved.kind, result.saved.folder.name, result.saved.max_difference) == ("adapter", "adapter", 0.0)
    expected = logits(trained_run(result).model)
    base = plain(files[0])
    before = logits(base)
    found = logits(peft.PeftModel.from_pretrained(base, str(result.saved.folder)))
    assert relative_error(found[-24:], expected[-24:]) < 1e-5
    assert relative_error(before, expected[-24:]) > 1e-3


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["lora", "embeddings too", "norms too"])
def test_a_16_bit_adapter_is_saved_as_trained(
    name: str, compute: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    result = train(files, tmp_path / "run", {**ADAPTERS[name], "precision": {"compute": compute}})
    saved = load_file(result.saved.folder / "adapter_model.safetensors")
    for name, parameter in trained_run(result).trainable():
        tensor = saved[f"base_model.model.{name}"]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, parameter)


@pytest.mark.parametrize("name", MODELS)
def test_models_load_in_transformers(name: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    result = train(files, tmp_path / "run", MODELS[name])
    assert (result.saved.kind, result.saved.folder.name) == ("model", "model")
    saved = load_file(result.saved.folder / "model.safetensors")
    run = trained_run(result)
    for parameter_name, parameter in run.model.named_parameters():
        assert torch.equal(saved[parameter_name], parameter.to(saved[parameter_name].dtype)), parameter_name
    is_pure = "pure" in name
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16 if is_pure else torch.float32}
    again = plain(result.saved.folder)
    assert relative_error(logits(again), logits(run.model.float())) < 1e-5
    assert len(AutoTokenizer.from_pretrained(result.saved.folder)) == 4096


def test_a_resized_vocabulary_is_saved(tmp_path: Path, files: tuple[Path, Path]) -> None:
    model = save_model(tmp_path / "small", vocab_size=4000)
    spec = {"name": str(model), "tokenizer": "embedded", "resize_vocabulary": True}
    result = train((model, files[1]), tmp_path / "run", {}, model=spec)
    assert plain(result.saved.folder).config.vocab_size == 4096


def test_tied_weights_stay_tied(tmp_path: Path, files: tuple[Path, Path]) -> None:
    model = save_model(tmp_path / "tied", tie_word_embeddings=True)
    result = train((model, files[1]), tmp_path / "run", {})
    assert "lm_head.weight" not in load_file(result.saved.folder / "model.safetensors")
    again = plain(result.saved.folder)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert relative_error(logits(again), logits(trained_run(result).model)) < 1e-5


def test_a_second_result_takes_the_place_of_the_first(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = train(files, tmp_path / "run", {"lora": {"rank": 4}})
    (result.saved.folder / "left_over").touch()
    api.resume(tmp_path / "run")
    assert not (result.saved.folder / "left_over").exists()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith((".partial", ".old"))]
    assert [entry["path"] for entry in events(tmp_path / "run", "saved")] == [str(result.saved.folder)] * 2


def test_an_adapter_that_learnt_nothing_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    methods = {"lora": {"rank": 4}, "sgd": {}}
    with pytest.raises(VerificationError, match="Every lora_B is zero") as caught:
        train(files, tmp_path / "run", methods, training={"steps": 1, "learning_rate": 1e-60})
    assert caught.value.exit_code == 4
    assert not (tmp_path / "run" / "adapter").exists()


def damaged(file_name: str, change: Callable[[dict[str, Tensor]], None], folder: Path) -> None:
    tensors = load_file(folder / file_name)
    change(tensors)
    save_file(tensors, folder / file_name, metadata={"format": "pt"})


def halve_one(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in sorted(tensors) if "v_proj" in name and bool(tensors[name].any()))
    tensors[name] *= 0.5


def test_a_wrongly_written_adapter_is_noticed(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_wrongly(model: nn.Module, lora: Any, folder: Path, base: str) -> None:
        save_adapter(model, lora, folder, base)
        damaged("adapter_model.safetensors", halve_one, folder)

    monkeypatch.setattr(finish, "save_adapter", save_wrongly)
    with pytest.raises(VerificationError, match=r"differs from the trained one, first in .*v_proj"):
        train(files, tmp_path / "run", {"lora": {"rank": 4}})
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_wrongly_written_model_is_noticed(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage_first(spec: Any) -> Any:
        damaged("model.safetensors", halve_one, Path(spec.name))
        return load_config(spec)

    monkeypatch.setattr(finish, "load_config", damage_first)
    with pytest.raises(VerificationError, match=r"logits differ from the trained one's by \d"):
        train(files, tmp_path / "run", {})
    assert not (tmp_path / "run" / "model").exists()


def test_logits_of_minus_infinity_are_equal_on_both_sides() -> None:
    nowhere = float("-inf")
    assert relative_difference(torch.tensor([[1.0, nowhere]]), torch.tensor([[1.0, nowhere]])) == 0.0
    assert relative_difference(torch.tensor([[1.0, nowhere]]), torch.tensor([[2.0, nowhere]])) == 0.5
    assert relative_difference(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, nowhere]])) == float("inf")
    assert math.isnan(relative_difference(torch.tensor([[math.nan]]), torch.tensor([[1.0]])))
