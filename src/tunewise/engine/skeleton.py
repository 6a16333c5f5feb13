"""What the blocks of a model are like, seen on the model itself, made without memory on torch's meta device.

Configurations say in many ways which blocks differ from which: a list with an entry for each block, a list of some
blocks' numbers, a period, how many come first. The modules that are made from them say it in one way, and a block
costs a millisecond.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from tunewise.layers.head import base_model_of

_NUMBERS_OF_BLOCKS = ("idx", "index", "layer_id", "layer_number")
"""Parts of the names of attributes that hold a block's own number, in which all blocks differ."""

_known: dict[str, tuple[tuple[str, int], ...]] = {}


def block_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """Return a word for each block of the model; blocks of one word compute alike and have tensors of like shapes."""
    return tuple(word for word, _ in _blocks(config))


def block_sizes(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the parameters of each block of the model."""
    return tuple(size for _, size in _blocks(config))


def _blocks(config: PretrainedConfig) -> tuple[tuple[str, int], ...]:
    """Return (kind, parameters) of each block."""
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _known:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        blocks = [each for each in base_model_of(model).modules() if isinstance(each, GradientCheckpointingLayer)]
        _known[key] = tuple((_word(block), sum(p.numel() for p in block.parameters())) for block in blocks)
    return _known[key]


def _word(block: nn.Module) -> str:
    """Hash modules, the options they keep as attributes, and shapes."""
    digest = hashlib.sha256()
    for name, module in block.named_modules():
        options = {key: value for key, value in vars(module).items() if _is_option(key, value)}
        digest.update(f"{name} {type(module).__qualname__} {sorted(options.items())}".encode())
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    return digest.hexdigest()[:12]


def _is_option(name: str, value: Any) -> bool:
    if name.startswith("_") or any(part in name for part in _NUMBERS_OF_BLOCKS):
        return False
    return value is None or isinstance(value, bool | int | float | str)
