"""A merged QA-LoRA model that stays in its few bits: one safetensors file and a config.json, written and read.

The format is described in docs/quantized-format.md. transformers has no quantizer for it (groups with a real-valued
offset): `load_quantized` makes the transformers model that computes with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tunewise.errors import InputError, StorageError
from tunewise.layers.group_quantized import GROUP_KINDS, GroupQuantizedLinear
from tunewise.layers.linear import is_tied, output_head
from tunewise.recipe import ModelSpec
from tunewise.workload.model import load_config

METHOD = "tunewise-groups"
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"


def save_quantized(model: PreTrainedModel, folder: Path) -> None:
    """Write a model with group-quantized layers; a head that is tied to the embedding is written once.

    Raises:
        StorageError: the folder cannot be written.
    """
    layers = quantized_layers(model)
    first = next(iter(layers.values()))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in _tied_names(model)}
    described = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "kind": first.kind,
        "group_size": first.group_size,
        "modules": list(layers),
    }
    config = {**model.config.to_dict(), "quantization_config": described}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"The quantized model cannot be written to {folder}: {error}") from error


def load_quantized(folder: str | Path) -> PreTrainedModel:
    """Read a model that `save_quantized` wrote, on the CPU, in evaluation mode, its layers packed as they were saved.

    Raises:
        InputError: the folder holds no such model, or a damaged one.
    """
    folder = Path(folder)
    config = load_config(ModelSpec(name=str(folder.resolve())))
    described = _described(getattr(config, "quantization_config", None), folder)
    del config.quantization_config
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} is missing or damaged: {error}") from error
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    assert isinstance(model, PreTrainedModel)
    for name in described["modules"]:
        layer = model.get_submodule(name).to("meta")
        model.set_submodule(name, GroupQuantizedLinear(layer, described["kind"], described["group_size"]))
    model.requires_grad_(False)
    _load_all(model, tensors, folder)
    return model.eval()


def _described(content: Any, folder: Path) -> dict[str, Any]:
    """Check what config.json says about the quantization."""
    method = content.get("quant_method") if isinstance(content, dict) else None
    if method != METHOD:
        raise InputError(f"{folder}: config.json names the quantization {method!r}, but only '{METHOD}' is read here.")
    if content.get("format_version") != FORMAT_VERSION or content.get("kind") not in GROUP_KINDS:
        raise InputError(f"{folder}: a format of another version of tunewise; config.json says {content}.")
    return dict(content)


def _load_all(model: PreTrainedModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Give the model its tensors; nothing may be missing but a tied head, and nothing may be left."""
    try:
        found = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"{folder / WEIGHTS} does not fit config.json: {str(error).splitlines()[-1].strip()}"
        ) from error
    model.tie_weights()
    wrong = sorted({*found.missing_keys, *found.unexpected_keys} - _tied_names(model))
    if wrong:
        raise InputError(f"{folder / WEIGHTS} does not fit config.json, first in '{wrong[0]}'.")


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Return the head's name where its tensor is the embedding's."""
    head = output_head(model)
    return {f"{name}.weight" for name, module in model.named_modules() if module is head} if is_tied(model) else set()


def quantized_layers(model: nn.Module) -> dict[str, GroupQuantizedLinear]:
    """Return the model's group-quantized layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupQuantizedLinear)}
