"""Mapped weights are the loaded ones, without memory of their own, or it is said why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.tiny_runs import logits, save_model
from tunewise.engine.allocator import allocated_bytes
from tunewise.recipe import ModelSpec
from tunewise.workload.mapped import load_mapped
from tunewise.workload.model import load_config, load_model


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "mistral"])
def test_mapped_equals_loaded(architecture: str, tmp_path: Path) -> None:
    spec = ModelSpec(name=str(save_model(tmp_path, architecture)))
    config = load_config(spec)
    mapped = load_mapped(spec, config, torch.float32)
    if isinstance(mapped, str):
        assert architecture == "gpt2"  # its files leave out the prefix of its decoder
        assert "called differently" in mapped
        return
    loaded = load_model(spec, config, torch.float32, seed=0)
    assert dict(mapped.named_buffers()).keys() == dict(loaded.named_buffers()).keys()
    assert torch.equal(logits(mapped), logits(loaded))


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    spec = ModelSpec(name=str(save_model(tmp_path, tie_word_embeddings=True)))
    config = load_config(spec)
    mapped = load_mapped(spec, config, torch.float32)
    assert not isinstance(mapped, str), mapped
    assert mapped.get_output_embeddings().weight is mapped.get_input_embeddings().weight
    assert torch.equal(logits(mapped), logits(load_model(spec, config, torch.float32, seed=0)))


def test_mapping_takes_no_memory_for_blocks(tmp_path: Path) -> None:
    """transformers makes one token embedding while it builds; everything else is the files' pages."""
    spec = ModelSpec(name=str(save_model(tmp_path, shard="200KB")))
    config = load_config(spec)
    loaded = load_model(spec, config, torch.float32, seed=0)
    embedding = loaded.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    assert embedding.nbytes < 0.5 * size
    assert allocated_bytes(lambda: load_mapped(spec, config, torch.float32)) < 1.01 * embedding.nbytes


def test_it_says_why_not(tmp_path: Path) -> None:
    spec = ModelSpec(name=str(save_model(tmp_path)))
    assert "float32" in str(load_mapped(spec, load_config(spec), torch.bfloat16))
    scratch = ModelSpec(name=str(tmp_path), weights="random")
    assert "folder" in str(load_mapped(scratch, load_config(scratch), torch.float32))
