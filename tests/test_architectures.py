"""Every architecture that tunewise names through the whole line: train, save, reload in transformers and peft.

The models are tiny and random, in fp32. Each goes through LoRA with packing (the defaults), a merged export, and full
fine-tuning; what a user would load must compute what was trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.unit.tiny_runs import logits, recipe_over, relative_error, save_model, write_records
from tunewise import api
from tunewise.engine.assemble import assemble, settle
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.state import restore_trainable
from tunewise.export.result import Result
from tunewise.recipe import Recipe


@dataclass(frozen=True)
class Case:
    """A name that users know, the architecture behind it, and what is special about this model."""

    name: str
    architecture: str
    changes: dict[str, Any] = field(default_factory=dict)
    shard: str | None = None


CASES = (
    Case("Llama, sharded", "llama", shard="100KB"),
    Case("Qwen2", "qwen2", {"tie_word_embeddings": False}),
    Case("Qwen2.5, tied", "qwen2", {"tie_word_embeddings": True}),
    Case("Qwen3, tied", "qwen3", {"tie_word_embeddings": True}),
    Case("Mistral, sliding window", "mistral"),
    Case("Mixtral", "mixtral"),
    Case("Gemma", "gemma", {"tie_word_embeddings": True}),
    Case("Gemma 2", "gemma2"),
    Case("Gemma 3", "gemma3_text"),
    Case("Phi-3", "phi3"),
    Case("Phi", "phi"),
    Case("GPT-2, tied, no pad token", "gpt2", {"pad_token_id": None}),
    Case("Pythia, vocabulary larger than the tokenizer", "gpt_neox", {"vocab_size": 4224}),
    Case("OPT", "opt"),
    Case("Falcon", "falcon"),
    Case("OLMo 2, sharded", "olmo2", shard="200KB"),
    Case("SmolLM, tied", "llama", {"tie_word_embeddings": True}),
    Case("SmolLM3", "smollm3"),
    Case("Qwen3-MoE", "qwen3_moe"),
    Case("BitNet", "bitnet"),
)


def trained_logits(recipe: Recipe, folder: Path) -> Tensor:
    """Return the logits of the run itself, rebuilt from its last checkpoint."""
    run = assemble(settle(recipe))
    restore_trainable(run, load_checkpoint(list_checkpoints(folder / "checkpoints")[-1][1])[0])
    run.documents.lengths = None
    return logits(run.model)


def plain(folder: Path) -> Any:
    """Load a model with transformers, as a user does."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl", num_records=20)


def three_steps(model: Path, data: Path, out: Path, **methods: Any) -> Result:
    recipe = recipe_over(
        model,
        data,
        methods={**methods, "packing": None, "precision": {"compute": "fp32"}},
        data={"max_length": 64},
        training={"steps": 3},
        evaluation={"every": 3, "keep_best": False},
        checkpoints={"every": 3},
    )
    return api.train(recipe, out=out)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adapter_and_merged_model(case: Case, data: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", case.architecture, case.shard, **case.changes)
    assert (model / "model.safetensors.index.json").exists() == (case.shard is not None)
    result = three_steps(model, data, tmp_path / "run", lora={"rank": 4})
    expected = trained_logits(result.recipe, result.folder)
    base = plain(model)
    assert relative_error(logits(base), expected) > 1e-3, "three steps have changed nothing"

    adapted = peft.PeftModel.from_pretrained(base, str(result.saved.folder))
    assert relative_error(logits(adapted), expected) < 1e-5

    merged = api.export_merged(result.folder, tmp_path / "merged")
    assert relative_error(logits(plain(merged.folder)), expected) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_full_fine_tuning(case: Case, data: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", case.architecture, case.shard, **case.changes)
    result = three_steps(model, data, tmp_path / "run")
    assert (result.saved.kind, result.saved.folder) == ("model", result.folder / "model")
    again = plain(result.saved.folder)
    expected = trained_logits(result.recipe, result.folder)
    assert relative_error(logits(again), expected) < 1e-5
    assert relative_error(logits(plain(model)), expected) > 1e-3, "three steps have changed nothing"
    is_tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert is_tied == bool(again.config.tie_word_embeddings)


def test_every_architecture_of_the_promise_is_here() -> None:
    architectures = {case.architecture for case in CASES}
    assert len(CASES) == 20
    assert len(architectures) == 18
    assert sum(case.shard is not None for case in CASES) == 2
