"""A tiny model's configuration, and a cache folder of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunewise.machine.catalogue import find
from tunewise.machine.machine import Machine
from tunewise.units import MIB

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1001,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWISE_CACHE", str(cache_folder))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(TINY))
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
