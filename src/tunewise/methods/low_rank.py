"""What LoRA and its relatives have in common: which linear layers get a low-rank update, and what is trained fully.

A relative of LoRA says with `make_layer` which layer it puts around a linear one (`layers.lora.LoRALinear` or a
subclass), and with `peft_options` what a PEFT adapter's configuration says about it.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar

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
from tunewise.layers.lora import LoRALinear
from tunewise.methods.method import Run
from tunewise.methods.naming import layer_number, select
from tunewise.recipe import Fidelity, Method, PositiveInt, Recipe, Slot
from tunewise.units import format_count

ALL_LINEAR = "all-linear"

Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LowRank(Method):
    """A low-rank update beside frozen linear layers; the options that all kinds of it share.

    Attributes:
        rank: columns of B, rows of A.
        dropout: probability of zeroing an input of the update in training.
        target_modules: "all-linear" (every linear layer but the output head), a tuple of name endings, or a
            regular expression for full names.
        exclude_modules: name endings (or an expression) to leave out of these.
        layers_to_transform: numbers of the decoder layers to adapt; None means all.
        modules_to_save: name endings of modules that are trained fully and saved with the adapter.
    """

    slot: ClassVar[Slot] = Slot.ADAPTER
    place: ClassVar[int] = 1
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    rank: PositiveInt = 16
    alpha: Alpha | None = None
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    modules_to_save: tuple[str, ...] = ()

    @property
    def effective_alpha(self) -> float:
        """Alpha, with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def needs_original_weights(self) -> bool:
        """Whether `make_layer` looks at weights as they were before quantization (`Run.original_weights`)."""
        return False

    @property
    def title(self) -> str:
        """What the user is told that was put on the layers."""
        return f"{type(self).__name__} r{self.rank} (alpha {self.effective_alpha:g})"

    def make_layer(self, run: Run, name: str, layer: nn.Module, generator: torch.Generator) -> LoRALinear:
        """Return the layer to put in the place of `layer`, whose full name is `name`, with its first values drawn.

        The run is being built: its model has other layers wrapped already.

        Raises:
            Conflict: this kind of update does not go with this layer.
        """
        raise NotImplementedError

    def peft_options(self, layer: LoRALinear) -> dict[str, Any]:
        """Return what PEFT's LoraConfig says about this method, of which `layer` is one layer, besides the sizes."""
        del layer
        return {}

    def conflict(self, recipe: Recipe) -> str | None:
        """Two low-rank updates of the same layers are one of a higher rank."""
        others = [method.name for method in recipe.methods or () if isinstance(method, LowRank)]
        if len(others) > 1:
            return f"{' and '.join(others)} are low-rank updates of the same layers; keep one of them"
        return None

    def apply(self, run: Run) -> None:
        """Wrap the target layers and set `modules_to_save` free; everything else is left as it is."""
        saved = self._modules_to_save(run.model)
        targets = self._targets(run.model, saved)
        for name, layer in targets.items():
            _refuse_trained_weight(self.name, name, layer)
            seed = derived_seed(run.recipe.seed, f"lora:{name}")
            adapted = self.make_layer(run, name, layer, torch.Generator().manual_seed(seed))
            adapted.train(layer.training)
            run.model.set_submodule(name, adapted)
        run.original_weights.clear()
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
            names = select(modules, self.target_modules, f"{self.name}.target_modules")
            for name in names:
                if not is_linear(modules[name]):
                    raise InputError(
                        f"{self.name}.target_modules: '{name}' is no linear layer but "
                        f"{type(modules[name]).__name__}. To train it fully put it into {self.name}.modules_to_save."
                    )
                if is_bypassed(model, name):
                    raise Conflict(
                        f"{self.name}.target_modules: the fused kernels of '{name.rpartition('.')[0]}' take the weight "
                        f"of '{name}' without calling the layer, so an update beside it would be ignored. Leave it out."
                    )
                if modules[name] is output_head(model) and is_tied(model):
                    raise Conflict(
                        f"{self.name}.target_modules: '{name}' shares its weight with the token embedding, so its "
                        f"update could not be merged. Leave it out, or train both as {self.name}.modules_to_save."
                    )
            layers = {name: modules[name] for name in names}
        if self.exclude_modules:
            excluded = set(select(names, self.exclude_modules, f"{self.name}.exclude_modules"))
            names = [name for name in names if name not in excluded]
        if self.layers_to_transform is not None:
            known = {layer_number(name) for name in names}
            for number in self.layers_to_transform:
                if number not in known:
                    raise InputError(f"{self.name}.layers_to_transform: there is no layer {number} among the targets.")
            names = [name for name in names if layer_number(name) in self.layers_to_transform]
        names = [name for name in names if not any(_is_inside(name, owner) for owner in saved)]
        if not names:
            raise InputError(
                f"{self.name}: target_modules, exclude_modules and modules_to_save together leave no layer."
            )
        return {name: layers[name] for name in names}

    def _modules_to_save(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules to train fully."""
        modules = {name: module for name, module in model.named_modules() if name}
        saved = {}
        for name in (
            select(modules, self.modules_to_save, f"{self.name}.modules_to_save") if self.modules_to_save else ()
        ):
            module = modules[name]
            if any(isinstance(part, PackedLinear) for part in module.modules()):
                raise Conflict(
                    f"{self.name}.modules_to_save would train '{name}', whose weight is quantized. Leave it out, or "
                    "put it into quantize.skip_modules."
                )
            if next(module.parameters(), None) is None:
                raise InputError(f"{self.name}.modules_to_save: '{name}' has no parameters to train.")
            saved[name] = module
        return saved

    def _report(self, run: Run, targets: dict[str, nn.Module], saved: dict[str, nn.Module]) -> None:
        trainable = sum(parameter.numel() for _, parameter in run.trainable())
        run.say(f"{self.title} on {len(targets)} linear layers: {format_count(trainable)} trainable parameters")
        if saved:
            tied = " (one tensor with the output head: both learn)" if _saves_tied(run.model, saved) else ""
            run.say(f"{type(self).__name__} trains fully: {', '.join(saved)}{tied}")
        stacked = stacked_experts(run.model)
        if stacked:
            count = sum(parameter.numel() for parameter in stacked.values())
            run.say(
                f"{format_count(count)} parameters of experts lie in stacked tensors such as "
                f"{next(iter(stacked))}, which are no linear layers: {type(self).__name__} leaves them as they are"
            )


def _refuse_trained_weight(method: str, name: str, layer: nn.Module) -> None:
    """A weight that is trained itself needs no low-rank update, and an adapter file could not hold it."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        raise Conflict(
            f"'{name}' is trained fully (by 'freeze') and adapted by '{method}'. Put it into "
            f"{method}.exclude_modules, or narrow freeze.train."
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
