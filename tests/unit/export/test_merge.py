"""A merged model computes what base and adapter computed, whatever the base was stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.unit.tiny_runs import logits, recipe_over, relative_error, save_model, write_records
from tunewise import api
from tunewise.engine.assemble import assemble, settle
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.state import restore_trainable
from tunewise.errors import InputError
from tunewise.export.finish import MERGE_TOLERANCE
from tunewise.export.result import Result

CASES: dict[str, tuple[dict[str, Any], float, torch.dtype]] = {
    "lora": ({"lora": {"rank": 4}}, 1e-5, torch.float32),
    "rslora": ({"lora": {"rank": 4, "use_rslora": True}}, 1e-5, torch.float32),
    "pissa": ({"lora": {"rank": 4, "init": "pissa"}}, 1e-5, torch.float32),
    "embeddings too": ({"lora": {"rank": 4, "modules_to_save": ["embed_tokens"]}}, 1e-5, torch.float32),
    "norms too": ({"lora": {"rank": 4}, "freeze": {"train": ["*norm*"]}}, 1e-5, torch.float32),
    "nf4": ({"lora": {"rank": 4}, "quantize": {"kind": "nf4"}}, 1e-5, torch.float32),
    "int8": ({"lora": {"rank": 4}, "quantize": {"kind": "int8"}}, 1e-5, torch.float32),
    "nf4 in bf16": (
        {"lora": {"rank": 4}, "quantize": {"kind": "nf4"}, "precision": {"compute": "bf16"}},
        MERGE_TOLERANCE[torch.bfloat16],
        torch.bfloat16,
    ),
    "bf16": (
        {"lora": {"rank": 4}, "precision": {"compute": "bf16"}},
        MERGE_TOLERANCE[torch.bfloat16],
        torch.bfloat16,
    ),
    "norms too in bf16": (
        {"lora": {"rank": 4}, "freeze": {"train": ["*norm*"]}, "precision": {"compute": "bf16"}},
        MERGE_TOLERANCE[torch.bfloat16],
        torch.float32,
    ),
    "fp16": (
        {"lora": {"rank": 4}, "precision": {"compute": "fp16"}},
        MERGE_TOLERANCE[torch.float16],
        torch.float16,
    ),
    "ia3": ({"peft": {"kind": "IA3"}}, 1e-5, torch.float32),
    "full": ({}, 1e-6, torch.float32),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("workload")
    return save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=30)


def train(files: tuple[Path, Path], out: Path, methods: dict[str, Any]) -> Result:
    methods = {"precision": {"compute": "fp32"}, **methods}
    last = {"evaluation": {"every": 3, "keep_best": False}, "training": {"steps": 3, "learning_rate": 1e-2}}
    return api.train(recipe_over(*files, methods=methods, **last), out=out)


@pytest.mark.parametrize("name", CASES)
def test_merged_equals_unmerged(name: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    methods, tolerance, dtype = CASES[name]
    result = train(files, tmp_path / "run", methods)
    saved = api.export_merged(tmp_path / "run", tmp_path / "merged")
    assert (saved.kind, saved.folder) == ("model", tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(saved.folder / "model.safetensors").values()} == {dtype}

    run = assemble(settle(result.recipe))
    restore_trainable(run, load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1][1])[0])
    run.documents.lengths = None
    with torch.autocast("cpu", run.autocast_dtype, enabled=run.autocast_dtype is not None):
        expected = logits(run.model)
    merged = AutoModelForCausalLM.from_pretrained(saved.folder, dtype=dtype, attn_implementation="eager")
    assert relative_error(logits(merged), expected) < tolerance
    base = AutoModelForCausalLM.from_pretrained(files[0], dtype=torch.float32)
    assert relative_error(logits(base), expected) > 1e-3
    assert not hasattr(merged.config, "quantization_config") or merged.config.quantization_config is None


def test_prompts_have_no_merged_form(files: tuple[Path, Path], tmp_path: Path) -> None:
    train(files, tmp_path / "run", {"peft": {"kind": "PROMPT_TUNING", "options": {"num_virtual_tokens": 4}}})
    with pytest.raises(InputError, match="PROMPT_TUNING adapter has no merged form"):
        api.export_merged(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_destination_must_be_new(files: tuple[Path, Path], tmp_path: Path) -> None:
    train(files, tmp_path / "run", {"lora": {"rank": 4}})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty"):
        api.export_merged(tmp_path / "run", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert api.export_merged(tmp_path / "run", tmp_path / "empty").folder == tmp_path / "empty"


def test_no_run_no_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe\.yaml"):
        api.export_merged(tmp_path, tmp_path / "merged")


def test_a_run_without_checkpoint_cannot_be_exported(files: tuple[Path, Path], tmp_path: Path) -> None:
    train(files, tmp_path / "run", {"lora": {"rank": 4}})
    for _, path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        path.rename(path.with_name("gone-" + path.name))
    with pytest.raises(InputError, match="has no checkpoint to take"):
        api.export_merged(tmp_path / "run", tmp_path / "merged")
