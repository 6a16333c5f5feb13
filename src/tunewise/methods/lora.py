"""LoRA: train a low-rank update beside frozen linear layers instead of the layers themselves.

Papers: LoRA, Hu et al. 2021 (arXiv 2106.09685); rsLoRA, Kalajdzievski 2023 (2312.03732); LoRA+, Hayou et al.
2024 (2402.12354); PiSSA, Meng et al. 2024 (2404.02948). Defaults (all linear layers, alpha = 2 rank):
Biderman et al. 2024, "LoRA learns less and forgets less" (2405.09673), section 5.
"""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from tunewise.errors import Conflict, InputError
from tunewise.layers.linear import (
    PackedLinear,
    is_bypassed,
    is_linear,
    is_tied,
    linear_layers,
    output_head,
    stacked_experts,
)
from tunewise.layers.lora import LoraInit, LoRALinear
from tunewise.methods.method import Run
from tunewise.methods.naming import layer_number, select
from tunewise.methods.quantization import Quantize
from tunewise.recipe import Fidelity, Method, PositiveInt, Recipe, Slot
from tunewise.units import format_count

ALL_LINEAR = "all-linear"


class LoRA(Method):
    """Low-rank adaptation with our own fast layer; written and read in PEFT's file format.

    Attributes:
        rank: columns of B, rows of A.
        alpha: numerator of the scale; None means 2 x rank.
        dropout: probability of zeroing an input of the update in training; above 0 the fast path is not
            taken.
        target_modules: "all-linear" (every linear layer but the output head), a tuple of name endings, or a
            regular expression for full names.
        exclude_modules: name endings (or an expression) to leave out of these.
        layers_to_transform: numbers of the decoder layers to adapt; None means all.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        lora_plus_ratio: factor on the learning rate of B (the paper recommends about 16); None means 1.
        init: how A and B start, see `LoRALinear.initialize`.
        modules_to_save: name endings of modules that are trained fully and saved with the adapter
            ("embed_tokens").
    """

    name: ClassVar[str] = "lora"
    slot: ClassVar[Slot] = Slot.ADAPTER
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    use_rslora: bool = False
    lora_plus_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    init: LoraInit = "kaiming"
    modules_to_save: tuple[str, ...] = ()

    @property
    def effective_alpha(self) -> float:
        """Alpha, with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """What the update B A is multiplied with (LoRA, section 4.1; rsLoRA, theorem 3.2)."""
        return self.effective_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def conflict(self, recipe: Recipe) -> str | None:
        """PiSSA writes into the base weight, which quantization has packed away."""
        if self.init == "pissa" and recipe.get(Quantize) is not None:
            return "lora's init 'pissa' changes the base weights, but 'quantize' packs them; use init 'kaiming'"
        return None

    def apply(self, run: Run) -> None:
        """Wrap the target layers and set `modules_to_save` free; everything else is left as it is."""
        saved = self._modules_to_save(run.model)
        targets = self._targets(run.model, saved)
        for name, layer in targets.items():
            _refuse_trained_weight(name, layer)
            adapted = LoRALinear(layer, self.rank, self.scale, self.dropout)
            seed = derived_seed(run.recipe.seed, f"lora:{name}")
            adapted.initialize(self.init, torch.Generator().manual_seed(seed))
            adapted.train(layer.training)
            run.model.set_submodule(name, adapted)
            if self.lora_plus_ratio is not None:
                run.learning_rate_factors[f"{name}.lora_B.weight"] = self.lora_plus_ratio
        for module in saved.values():
            module.requires_grad_(True)
        self._report(run, targets, saved)

    def _targets(self, model: nn.Module, saved: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Return the layers to wrap, in the model's order."""
        layers = linear_layers(model)
        if self.target_modules == ALL_LINEAR:
            names = list(layers)
        else:
            modules = {name: module for name, module in model.named_modules() if name}
            names = select(modules, self.target_modules, "lora.target_modules")
            for name in names:
                if not is_linear(modules[name]):
                    raise InputError(
                        f"lora.target_modules: '{name}' is no linear layer but "
                        f"{type(modules[name]).__name__}. To train it fully put it into lora.modules_to_save."
                    )
                if is_bypassed(model, name):
                    raise Conflict(
                        f"lora.target_modules: the fused kernels of '{name.rpartition('.')[0]}' take the weight of "
                        f"'{name}' without calling the layer, so an update beside it would be ignored. Leave it out."
                    )
                if modules[name] is output_head(model) and is_tied(model):
                    raise Conflict(
                        f"lora.target_modules: '{name}' shares its weight with the token embedding, so its "
                        "update could not be merged. Leave it out, or train both as lora.modules_to_save."
                    )
            layers = {name: modules[name] for name in names}
        if self.exclude_modules:
            excluded = set(select(names, self.exclude_modules, "lora.exclude_modules"))
            names = [name for name in names if name not in excluded]
        if self.layers_to_transform is not None:
            known = {layer_number(name) for name in names}
            for number in self.layers_to_transform:
                if number not in known:
                    raise InputError(f"lora.layers_to_transform: there is no layer {number} among the targets.")
            names = [name for name in names if layer_number(name) in self.layers_to_transform]
        names = [name for name in names if not any(_is_inside(name, owner) for owner in saved)]
        if not names:
            raise InputError("lora: target_modules, exclude_modules and modules_to_save together leave no layer.")
        return {name: layers[name] for name in names}

    def _modules_to_save(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules to train fully."""
        modules = {name: module for name, module in model.named_modules() if name}
        saved = {}
        for name in select(modules, self.modules_to_save, "lora.modules_to_save") if self.modules_to_save else ():
            module = modules[name]
            if any(isinstance(part, PackedLinear) for part in module.modules()):
                raise Conflict(
                    f"lora.modules_to_save would train '{name}', whose weight is quantized. Leave it out, or "
                    "put it into quantize.skip_modules."
                )
            if next(module.parameters(), None) is None:
                raise InputError(f"lora.modules_to_save: '{name}' has no parameters to train.")
            saved[name] = module
        return saved

    def _report(self, run: Run, targets: dict[str, nn.Module], saved: dict[str, nn.Module]) -> None:
        trainable = sum(parameter.numel() for _, parameter in run.trainable())
        kind = "rsLoRA" if self.use_rslora else "LoRA"
        run.say(
            f"{kind} r{self.rank} (alpha {self.effective_alpha:g}) on {len(targets)} linear layers: "
            f"{format_count(trainable)} trainable parameters"
        )
        if saved:
            tied = " (one tensor with the output head: both learn)" if _saves_tied(run.model, saved) else ""
            run.say(f"LoRA trains fully: {', '.join(saved)}{tied}")
        stacked = stacked_experts(run.model)
        if stacked:
            count = sum(parameter.numel() for parameter in stacked.values())
            run.say(
                f"{format_count(count)} parameters of experts lie in stacked tensors such as "
                f"{next(iter(stacked))}, which are no linear layers: LoRA leaves them as they are"
            )


def _refuse_trained_weight(name: str, layer: nn.Module) -> None:
    """A weight that is trained itself needs no low-rank update, and an adapter file could not hold it."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        raise Conflict(
            f"'{name}' is trained fully (by 'freeze') and adapted by 'lora'. Put it into "
            "lora.exclude_modules, or narrow freeze.train."
        )


def _is_inside(name: str, owner: str) -> bool:
    return name == owner or name.startswith(owner + ".")


def _saves_tied(model: nn.Module, saved: dict[str, nn.Module]) -> bool:
    get = getattr(model, "get_input_embeddings", None)
    embedding = None if get is None else get()
    return is_tied(model) and any(module is embedding for module in saved.values())


def derived_seed(seed: int, name: str) -> int:
    """Return a seed that depends on the recipe's seed and a name, not on the order of things."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
