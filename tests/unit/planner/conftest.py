"""A tiny model's configuration, and a cache folder of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunewise.machine.catalogue import find
from tunewise.machine.machine import Machine
from tunewise.units import MIB

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8001,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
"""On fake tensors a model of any width costs the same; this one keeps a T4 busy."""


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWISE_CACHE", str(cache_folder))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two blocks, which are traced as they are: half the traces of a deeper model."""
    return _config(tmp_path_factory, 2)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve blocks, extended from two and three (or four)."""
    return _config(tmp_path_factory, 12)


def _config(tmp_path_factory: pytest.TempPathFactory, num_blocks: int) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps({**SMALL, "num_hidden_layers": num_blocks}))
    return str(path)


@pytest.fixture(scope="session")
def card() -> Callable[[int], Machine]:
    """Make a T4-like card that can do bf16, with so many MiB for tensors."""
    t4 = find("T4")
    rates = {**t4.flops_per_second, "bf16": 65e12}

    def make(usable_mib: int) -> Machine:
        return t4.replace(
            name=f"card of {usable_mib} MiB", usable_memory_bytes=usable_mib * MIB, flops_per_second=rates
        )

    return make
