"""Bottleneck adapters: small trained networks behind the layers of a frozen model.

Papers: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751); Pfeiffer et al. 2020,
"AdapterFusion" (2005.00247), which keeps the one behind the feed-forward layer only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tunewise.errors import Conflict, InputError
from tunewise.layers.bottleneck import Activation, Bottleneck
from tunewise.layers.linear import is_linear, linear_shape
from tunewise.layers.lora import LoRALinear
from tunewise.methods.low_rank import derived_seed
from tunewise.methods.method import Run
from tunewise.methods.naming import ends_with, select
from tunewise.recipe import Fidelity, Method, PositiveInt, Recipe, Slot
from tunewise.units import format_count

_ATTENTION_ENDS = ("o_proj", "out_proj", "dense", "attn.c_proj")
_FEED_FORWARD_ENDS = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj", "w2")
"""How models call the last linear layer of attention and of the feed-forward network."""


class BottleneckAdapter(Method):
    """A small network with a residual connection behind the last linear layers of attention and feed-forward part.

    Formula: y = h + s U f(D h + d) + u, where h is what the layer computed; U, u and d start as zeros, so training
    starts at the base model. Goes together with 'lora' and its kin, 'freeze' and prompts of 'peft'. peft has no such
    adapter: the file has PEFT's layout (adapter_config.json, adapter_model.safetensors) with a peft_type of ours;
    `tunewise.load_adapter` reads it.

    Source: Houlsby et al. 2019 (arXiv 1902.00751), section 2.1; Pfeiffer et al. 2020 (2005.00247) for `after:
    [mlp]`. When to use: a nonlinear change is wanted, or several methods are compared or stacked (Delta Tuning, Ding
    et al. 2022, 2203.06904). When not: the model has to run as fast as its base; this one cannot be merged.

    Attributes:
        size: width of the bottleneck.
        after: behind which parts of a block.
        activation: f.
        scale: s.
        target_modules: name endings of the linear layers behind which adapters stand, for models whose names are not
            known; None means by `after`.
    """

    name: ClassVar[str] = "bottleneck"
    slot: ClassVar[Slot] = Slot.ADAPTER
    place: ClassVar[int] = 2
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    size: PositiveInt = 64
    after: Annotated[tuple[Literal["attention", "mlp"], ...], Field(min_length=1)] = ("attention", "mlp")
    activation: Activation = "gelu"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    target_modules: tuple[str, ...] | None = None

    def conflict(self, recipe: Recipe) -> str | None:
        """The library would find our layer where it looks for a linear one."""
        peft = next((method for method in recipe.methods or () if method.name == "peft"), None)
        if peft is not None and not getattr(peft, "is_prompt_learning", False):
            return "bottleneck and this kind of peft's would both wrap the same layers; keep one of them"
        return None

    def apply(self, run: Run) -> None:
        """Put adapters behind the layers, whatever is on them already.

        Raises:
            InputError: the model has no layer of the names that the recipe gives.
            Conflict: it has none of the usual names.
        """
        adapters = self.put_behind(run.model, self._targets(run.model))
        for name, adapter in adapters.items():
            seed = derived_seed(run.recipe.seed, f"bottleneck:{name}")
            adapter.initialize(torch.Generator().manual_seed(seed))
        count = sum(
            parameter.numel()
            for adapter in adapters.values()
            for part in (adapter.adapter_down, adapter.adapter_up)
            for parameter in part.parameters()
        )
        run.say(
            f"bottleneck adapters of size {self.size} behind {len(adapters)} layers: {format_count(count)} parameters"
        )

    def put_behind(self, model: nn.Module, names: Iterable[str]) -> dict[str, Bottleneck]:
        """Put adapters of zeros behind the layers `names` and return them.

        Raises:
            InputError: the model has no such linear layer.
        """
        layers, adapters = _layers(model), {}
        for name in names:
            if name not in layers:
                raise InputError(f"bottleneck: the model has no linear layer '{name}'.")
            layer = layers[name]
            out_features = layer.out_features if isinstance(layer, LoRALinear) else linear_shape(layer)[1]
            adapters[name] = Bottleneck(layer, out_features, self.size, self.activation, self.scale)
            adapters[name].train(layer.training)
            model.set_submodule(name, adapters[name])
        return adapters

    def _targets(self, model: nn.Module) -> list[str]:
        """Return the layers' names, in the model's order."""
        layers = _layers(model)
        if self.target_modules is not None:
            return select(layers, self.target_modules, "bottleneck.target_modules")
        ends = _ATTENTION_ENDS * ("attention" in self.after) + _FEED_FORWARD_ENDS * ("mlp" in self.after)
        found = [name for name in layers if any(ends_with(name, end) for end in ends)]
        if not found:
            raise Conflict(
                f"bottleneck: this model has no layer that is called {', '.join(ends)}. Name the last linear layers of "
                "its attention and feed-forward parts in bottleneck.target_modules."
            )
        return found


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers, with a low-rank update or without; of one that has it, not the layer inside."""
    return {
        name: module
        for name, module in model.named_modules()
        if (is_linear(module) or isinstance(module, LoRALinear)) and not name.endswith(".base_layer")
    }
