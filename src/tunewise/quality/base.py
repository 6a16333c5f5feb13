"""The base model inside a run: its adapter switched off, so that no second model stands in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from tunewise.errors import Conflict
from tunewise.layers.lora import Factor, LoRALinear, lora_layers
from tunewise.methods.method import Run
from tunewise.methods.peft import Peft


def has_switch(run: Run) -> bool:
    """Whether everything that `run` trains is an adapter that can be switched off."""
    if run.recipe.get(Peft) is not None:
        return True
    factors = {id(module.weight) for module in run.model.modules() if isinstance(module, Factor)}
    return bool(factors) and all(id(parameter) in factors for _, parameter in run.trainable())


@contextmanager
def adapter_off(run: Run) -> Iterator[None]:
    """Let the run's model compute what its base computes.

    A LoRA layer's scale becomes 0, which leaves the base's product bit for bit; PiSSA, which took its factors out of
    the base weight, gets these back.

    Raises:
        Conflict: base weights are trained, so the base is gone.
    """
    if not has_switch(run):
        raise Conflict(
            "The base model cannot be had by switching an adapter off: weights of its own are trained. Measure the "
            "base before training instead."
        )
    if run.recipe.get(Peft) is not None:
        with run.model.disable_adapter():  # type: ignore[operator]
            yield
        return
    layers = list(lora_layers(run.model).values())
    kept = [_switch_off(layer) for layer in layers]
    try:
        yield
    finally:
        for layer, (scale, a_RI, b_OR) in zip(layers, kept, strict=True):
            layer.scale = scale
            layer.lora_A.weight.data, layer.lora_B.weight.data = a_RI, b_OR


def base_weights(run: Run) -> AbstractContextManager[None]:
    """Return the region in which an untrained run is its base: peft's kinds do not all begin as that."""
    return nullcontext() if run.recipe.get(Peft) is None else adapter_off(run)


def _switch_off(layer: LoRALinear) -> tuple[float, torch.Tensor, torch.Tensor]:
    kept = (layer.scale, layer.lora_A.weight.data, layer.lora_B.weight.data)
    if layer.initial_a is not None and layer.initial_b is not None:
        layer.lora_A.weight.data, layer.lora_B.weight.data = layer.initial_a, layer.initial_b
    else:
        layer.scale = 0.0
    return kept
