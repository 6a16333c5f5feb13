"""Adapters in PEFT's file format: `adapter_model.safetensors` beside `adapter_config.json`, written and read.

What is written here loads with `peft.PeftModel.from_pretrained` on the original base model; what PEFT wrote
as a plain LoRA is read into our own layers. Nothing here imports peft but the two functions at the end, which
serve the method 'peft'.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunewise.errors import InputError, MissingBackend, StorageError, did_you_mean
from tunewise.layers.bottleneck import Bottleneck, Projection, plain_names
from tunewise.layers.dora import DoRALinear
from tunewise.layers.linear import PackedLinear, is_linear, is_tied, is_transposed, output_head
from tunewise.layers.lora import Factor, LoRALinear, lora_layers
from tunewise.layers.qalora import QALoRALinear
from tunewise.methods.lora import LoRA
from tunewise.methods.low_rank import LowRank

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

PREFIX = "base_model.model."
"""What PEFT puts before a name of the base model: its own two wrappers."""


_PEFT_DEFAULTS = {
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
}


def save_adapter(model: nn.Module, method: LowRank, folder: Path, base_model_name: str) -> None:
    """Write the model's LoRA layers, and whatever else of it is trained, as a PEFT adapter.

    PiSSA is written as the plain LoRA of twice the rank that changes the original base weights in the same
    way, see `LoRALinear.update_factors`; so any adapter loads on the model that the user started from. A tied
    embedding that was trained is written twice, once for each of its names, because PEFT gives each name a
    copy of its own.

    Raises:
        InputError: the model has no LoRA layer, or one whose base weight is trained too.
        StorageError: the folder cannot be written.
    """
    layers = _layers(model)
    if not layers:
        raise InputError("save_adapter: the model has no LoRA layer.")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_a, lora_b = layer.update_factors()
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_b
        if isinstance(layer, DoRALinear):
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    options = method.peft_options(next(iter(layers.values())))
    extra, saved_modules, bias = _other_trained(model)
    tensors |= extra
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        **_sizes(layers, bool(options.get("use_rslora"))),
        "lora_dropout": method.dropout,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": _target_words(model, set(layers)),
        "modules_to_save": saved_modules or None,
        "bias": bias,
        "fan_in_fan_out": all(_stands_for_conv1d(layer.base_layer) for layer in layers.values()),
        **options,
    }
    contiguous = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"The adapter cannot be written to {folder}: {error}") from error


def load_adapter(model: nn.Module, folder: Path) -> LoRA:
    """Put a PEFT LoRA adapter into `model`, and return the LoRA method that describes it.

    A model without LoRA layers gets them; a model that has them (a run that was built) must have them in the
    same places and sizes, and gets the values. New layers are frozen.

    Raises:
        InputError: the folder holds no LoRA adapter, one for another model, or a variant that our layer does
            not compute.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    names = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    if not names:
        raise InputError(f"{folder / WEIGHTS}: there is no LoRA factor in it.")
    present = _layers(model)
    if present and sorted(present) != names:
        raise InputError(f"{folder}: the adapter's layers are not those that the model has LoRA on.")
    for variant, kind in (("use_qalora", QALoRALinear), ("use_dora", DoRALinear)):
        if any(isinstance(layer, kind) != bool(config.get(variant)) for layer in present.values()):
            raise InputError(f"{folder}: '{variant}' is true of one of adapter and model only.")
    for name in names:
        lora_a, lora_b = (tensors.pop(f"{name}.lora_{factor}.weight", None) for factor in "AB")
        if lora_a is None or lora_b is None:
            raise InputError(f"{folder / WEIGHTS}: one of the two factors of '{name}' is missing.")
        layer = _load_layer(model, name, lora_a, lora_b, config, folder)
        if isinstance(layer, DoRALinear):
            _load_lengths(layer, name, tensors.pop(f"{name}.lora_magnitude_vector", None), folder)
    _load_other(model, tensors, folder / WEIGHTS)
    layer = _layers(model)[names[0]]
    return LoRA(
        rank=layer.rank,
        alpha=layer.scale * (math.sqrt(layer.rank) if config["use_rslora"] else layer.rank),
        dropout=config["lora_dropout"],
        use_rslora=config["use_rslora"],
        target_modules=tuple(_target_words(model, set(names))),
        modules_to_save=tuple(config["modules_to_save"] or ()),
    )


def save_peft(model: nn.Module, folder: Path) -> None:
    """Write the adapter of a model that the method 'peft' has wrapped, through the library itself.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        model.save_pretrained(str(folder), safe_serialization=True)  # type: ignore[operator]
    except (OSError, SafetensorError) as error:
        raise StorageError(f"The adapter cannot be written to {folder}: {error}") from error


def load_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Wrap a base model with the adapter that `save_peft` wrote.

    Raises:
        MissingBackend: peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise MissingBackend("peft", f"loading the adapter {folder}", "peft") from None
    loaded = peft.PeftModel.from_pretrained(model, str(folder))
    assert isinstance(loaded, nn.Module)
    return loaded


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's low-rank layers by the names of the layers that they wrap."""
    plain = plain_names(model)
    return {plain(name): layer for name, layer in lora_layers(model).items()}


def _sizes(layers: dict[str, LoRALinear], use_rslora: bool) -> dict[str, Any]:
    """Return rank and alpha: the most common ones, and patterns for the layers that differ."""
    ranks = {name: layer.update_factors()[0].shape[0] for name, layer in layers.items()}
    alphas = {
        name: layer.scale * (math.sqrt(ranks[name]) if use_rslora else ranks[name]) for name, layer in layers.items()
    }
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _stands_for_conv1d(layer: nn.Module) -> bool:
    return is_transposed(layer) or (isinstance(layer, PackedLinear) and layer.was_transposed)


def _other_trained(model: nn.Module) -> tuple[dict[str, Tensor], list[str], str]:
    """Return what is trained besides the factors: tensors under PEFT's names, modules_to_save, and `bias`.

    A module of which only the bias is trained keeps its place (PEFT's bias = "all"); every other one is saved
    whole.
    """
    plain = plain_names(model)
    modules = {plain(name): module for name, module in model.named_modules() if not isinstance(module, Bottleneck)}
    trained: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = plain(name).rpartition(".")
        if parameter.requires_grad and not isinstance(modules[owner], Factor | LoRALinear | Projection):
            trained.setdefault(owner, []).append(leaf)
    tensors: dict[str, Tensor] = {}
    saved_modules = []
    bias = "none"
    for owner, leaves in trained.items():
        state = modules[owner].state_dict()
        if leaves == ["bias"]:
            bias = "all"
            tensors[f"{PREFIX}{owner}.bias"] = state["bias"]
        else:
            if owner.endswith(".base_layer"):
                raise InputError(f"'{owner}' is trained and adapted at once; merge it and save the whole model.")
            saved_modules.append(owner)
            tensors |= {f"{PREFIX}{owner}.{key}": value for key, value in state.items()}
    return tensors, saved_modules, bias


def _target_words(model: nn.Module, adapted: set[str]) -> list[str]:
    """Return the shortest `target_modules` by which PEFT finds exactly the adapted layers.

    A word is the last component of a name ("q_proj") where every module of that name is adapted, else the
    full name.
    """
    plain = plain_names(model)
    everything = {plain(name) for name, _ in model.named_modules()} - adapted
    words = set()
    for name in adapted:
        last = name.rpartition(".")[2]
        is_unique = not any(other == last or other.endswith("." + last) for other in everything)
        words.add(last if is_unique else name)
    return sorted(words)


def _read_config(folder: Path) -> dict[str, Any]:
    """Read and check adapter_config.json; absent fields get PEFT's defaults."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} is no adapter: there is no {CONFIG} in it.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InputError(f"{path}: peft_type is {kind!r}, but only LORA is read here; use peft itself.")
    config = {**_PEFT_DEFAULTS, **config}
    init = str(config["init_lora_weights"]).lower()
    known = ("true", "false", "gaussian", "orthogonal", "eva", "pissa")
    if init not in known:
        raise InputError(
            f"{path}: init_lora_weights '{init}' changes the base model when it loads; "
            "convert the adapter to a plain LoRA (path_initial_model_for_weight_conversion in peft) first."
        )
    for variant in ("lora_bias", "alora_invocation_tokens", "target_parameters"):
        if config.get(variant):
            raise InputError(f"{path}: '{variant}' is set, which our LoRA layer does not compute; use peft itself.")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors, their names without PEFT's prefix."""
    if not path.is_file():
        raise InputError(f"{path} is missing. (A .bin adapter is pickle and is not read; let peft convert it.)")
    try:
        with safe_open(path, framework="pt") as file:
            return {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error


def _load_layer(
    model: nn.Module, name: str, lora_a: Tensor, lora_b: Tensor, config: dict[str, Any], folder: Path
) -> LoRALinear:
    """Copy the factors of one layer, wrapping it first where it is not yet a LoRA layer; return it."""
    rank = lora_a.shape[0]
    alpha = _pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    is_pissa = str(config["init_lora_weights"]).lower() == "pissa"
    layer = _layers(model).get(name) or _submodule(model, name, folder)
    if not isinstance(layer, LoRALinear):
        if not is_linear(layer):
            kind = type(layer).__name__
            raise InputError(f"{folder}: '{name}' is no linear layer but {kind}; use peft itself.")
        if config.get("use_qalora"):
            raise InputError(f"{folder}: QA-LoRA needs the quantized base that it was trained on; build the run again.")
        make = DoRALinear if config.get("use_dora") else LoRALinear
        layer = make(layer, rank, scale, config["lora_dropout"])
        if is_pissa or isinstance(layer, DoRALinear):
            layer.initialize("pissa" if is_pissa else "kaiming", torch.Generator())
        layer.requires_grad_(False)
        model.set_submodule(name, layer)
    elif (layer.initial_a is not None) != is_pissa or not math.isclose(layer.scale, scale, rel_tol=1e-6):
        raise InputError(f"{folder}: alpha or the kind of initialization differ from the model's at '{name}'.")
    for parameter, tensor in ((layer.lora_A.weight, lora_a), (layer.lora_B.weight, lora_b)):
        if parameter.shape != tensor.shape:
            ours, theirs = tuple(parameter.shape), tuple(tensor.shape)
            raise InputError(f"{folder}: '{name}' has a factor of {theirs}, the model one of {ours}.")
        with torch.no_grad():
            parameter.copy_(tensor)
    return layer


def _load_lengths(layer: DoRALinear, name: str, lengths_O: Tensor | None, folder: Path) -> None:
    """Copy the lengths of the rows of one DoRA layer."""
    if lengths_O is None or lengths_O.shape != layer.lora_magnitude_vector.shape:
        raise InputError(f"{folder / WEIGHTS}: '{name}' needs a lora_magnitude_vector of {layer.out_features} numbers.")
    with torch.no_grad():
        layer.lora_magnitude_vector.copy_(lengths_O)


def _submodule(model: nn.Module, name: str, folder: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        hint = did_you_mean(name, (known for known, module in model.named_modules() if is_linear(module)))
        raise InputError(f"{folder}: the adapter has a layer '{name}', the model not.{hint}") from None


def _load_other(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy fully trained modules; the two names of a tied tensor must agree."""
    plain = plain_names(model)
    places = {
        plain(name): place for name, place in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    }
    for name, tensor in tensors.items():
        if name not in places:
            raise InputError(f"{path}: the adapter has a tensor '{name}', the model not.")
        if places[name].shape != tensor.shape:
            ours, theirs = tuple(places[name].shape), tuple(tensor.shape)
            raise InputError(f"{path}: '{name}' has the shape {theirs}, in the model {ours}.")
    tied = [name for name in tensors if is_tied(model) and places[name] is getattr(output_head(model), "weight", None)]
    if tied and (len(tied) != 2 or not torch.equal(tensors[tied[0]], tensors[tied[1]])):
        raise InputError(
            f"{path}: the adapter holds a '{tied[0]}' of its own, but in this model token embedding and "
            "output head are one tensor. Load the base model with tie_word_embeddings=False."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)


def _pattern_value(patterns: dict[str, float] | None, name: str, default: float) -> float:
    """Return the value of the first pattern that ends `name`, as PEFT looks up alpha_pattern."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
