"""Published models by their shapes: what a step needs and trains, by a dry run of the very step, without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.estimate import Estimate
from tunewise.methods import complete
from tunewise.methods.reading import recipe_from_mapping


def llama(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    *,
    num_key_value_heads: int | None = None,
    vocab_size: int = 32000,
    tie_word_embeddings: bool = False,
) -> LlamaConfig:
    """Return the configuration of a Llama-like model of this shape."""
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads or num_attention_heads, max_position_embeddings=8192,
        tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip


LLAMA_3_2_3B = llama(3072, 8192, 28, 24, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True)


def estimate(
    config: LlamaConfig, methods: dict[str, Any], *, rows: int = 1, length: int = 16, **training: Any
) -> Estimate:
    """Dry-run a step of one micro-batch on a GPU, as far as a CPU can know it (see docs/how-estimates-work.md)."""
    mapping = {
        "model": {"name": "shape", "weights": "random"},
        "data": {"source": "none"},
        "methods": methods,
        "batch": {"documents": rows, "micro_batch_size": rows},
        "training": training,
        "device": "cuda",
    }
    recipe = complete(recipe_from_mapping(mapping, "reproduction"), config, torch.device("cuda"))
    return dry_run(recipe, config, "cuda", [BatchShape.uniform(rows, length)])


def gigabytes(config: LlamaConfig, methods: dict[str, Any], *, rows: int, length: int) -> float:
    """Return what the fullest instant of a step needs, 10^9 bytes, context included."""
    return estimate(config, methods, rows=rows, length=length).needed_bytes / 1e9


def trained_parameters(config: LlamaConfig, methods: dict[str, Any]) -> int:
    """Return how many parameters the methods train."""
    return estimate(config, methods).trainable_parameters
