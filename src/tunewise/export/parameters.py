"""Trained parameters that no PEFT format holds: bottleneck adapters, and tensors of the model itself beside them.

PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`, names behind `base_model.model.`) with a peft_type of
ours, so peft refuses it with a clear message; a tensor of the base model lies under its own name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunewise.errors import InputError, StorageError
from tunewise.export.adapter import CONFIG, PREFIX, WEIGHTS
from tunewise.layers.bottleneck import bottlenecks, plain_names
from tunewise.methods.bottleneck import BottleneckAdapter

PEFT_TYPE = "TUNEWISE_PARAMETERS"


def save_parameters(
    model: nn.Module, names: list[str], method: BottleneckAdapter | None, folder: Path, base_model_name: str
) -> None:
    """Write the parameters `names` of a model, without peft's wrapper around it.

    Args:
        model: the model.
        names: of what is trained.
        method: the adapters that the model has, which are put in place before reading; None: none.
        folder: where to.
        base_model_name: what is written as the base.

    Raises:
        StorageError: the folder cannot be written.
    """
    present, plain = dict(model.named_parameters(remove_duplicate=False)), plain_names(model)
    tensors = {PREFIX + plain(name): present[name].detach().to("cpu", copy=True).contiguous() for name in names}
    config = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": base_model_name,
        "bottleneck": None if method is None else method.model_dump(mode="json"),
        "behind": list(bottlenecks(model)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"The adapter cannot be written to {folder}: {error}") from error


def load_parameters(model: nn.Module, folder: Path) -> None:
    """Put what `save_parameters` wrote into a model; adapters are put in place where it has none yet.

    Raises:
        InputError: the files are damaged or belong to another model.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        described, behind = config["bottleneck"], tuple(config["behind"])
        method = None if described is None else BottleneckAdapter.model_validate(described)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise InputError(f"{folder} holds no {PEFT_TYPE} that can be read: {error}") from error
    if method is not None and not bottlenecks(model):
        method.put_behind(model, behind)
    plain = plain_names(model)
    present = {PREFIX + plain(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors.items():
        if name not in present or present[name].shape != tensor.shape:
            theirs = tuple(tensor.shape)
            ours = tuple(present[name].shape) if name in present else "no such tensor"
            raise InputError(f"{folder / WEIGHTS}: '{name}' has the shape {theirs}, in the model {ours}.")
    _copy(present, tensors)


@torch.no_grad()
def _copy(present: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        present[name].copy_(tensor)
