"""What several tools need to say a LoRA adapter in peft's terms."""

from __future__ import annotations

import re

from tunewise.errors import InputError
from tunewise.export.peers.ledger import Ledger
from tunewise.layers.group_quantized import GROUP_KINDS
from tunewise.methods import ALL, LoRA, Quantize
from tunewise.methods.low_rank import ALL_LINEAR
from tunewise.recipe import Recipe, Slot

ADAPTERS = tuple(method.name for method in ALL if method.slot == Slot.ADAPTER and method is not LoRA)


def refuse_other_adapters(ledger: Ledger, recipe: Recipe, *known: str) -> None:
    """Refuse adapters that the tool has not got: without them its file would train something else entirely.

    Raises:
        InputError: the recipe has an adapter other than 'lora', and it is not among `known`; or quantizes in groups.
    """
    for name in ADAPTERS:
        if ledger.has(name) and name not in known:
            raise InputError(
                f"export: {ledger.peer} has no counterpart for '{name}', and without it the file would train all "
                f"weights. Use 'lora', or train with tunewise."
            )
    quantize = recipe.get(Quantize)
    if quantize is not None and quantize.kind in GROUP_KINDS:
        raise InputError(
            f"export: {ledger.peer} cannot quantize to {quantize.kind} with an offset for each group. Use kind nf4, or "
            "train with tunewise."
        )


def integer_alpha(ledger: Ledger, lora: LoRA, name: str) -> int:
    """Return alpha for a tool that takes whole numbers only."""
    ledger.take("lora.alpha", name)
    alpha = max(1, round(lora.effective_alpha))
    if alpha != lora.effective_alpha:
        ledger.miss("lora.alpha", f"{ledger.peer} takes whole numbers; written as {alpha}")
    return alpha


def peft_targets(ledger: Ledger, lora: LoRA, name: str, layers_name: str | None = None) -> str | list[str]:
    """Return the targets as peft's `target_modules`: its word for all, a regular expression, or a list of endings.

    Args:
        ledger: accounts for targets and layers.
        lora: whose targets.
        name: the tool's key of the targets.
        layers_name: its key of the layers; where it has none, layers are worked into a regular expression if the
            targets are names.
    """
    ledger.take("lora.target_modules", name)
    layers = lora.layers_to_transform
    if layers is None or layers_name is not None:
        ledger.take("lora.layers_to_transform", layers_name or name)
    elif isinstance(lora.target_modules, tuple):
        ledger.take("lora.layers_to_transform", name)
        return _in_layers(lora.target_modules, layers)
    else:
        ledger.miss("lora.layers_to_transform", f"{ledger.peer} has no option for layers; all of them get an adapter")
    return lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)


def one_expression(endings: list[str]) -> str:
    """Return a regular expression for full names that end with one of `endings`, as peft matches a list of them.

    A list of a single name becomes a plain text in TRL and Unsloth, which peft then takes for an expression that has
    to match the whole name; this one does.
    """
    return rf"(?:.*\.)?(?:{'|'.join(re.escape(ending) for ending in endings)})"


def is_all_linear(lora: LoRA) -> bool:
    """Whether every linear layer but the head gets an adapter."""
    return lora.target_modules == ALL_LINEAR


def _in_layers(endings: tuple[str, ...], layers: tuple[int, ...]) -> str:
    numbers = "|".join(str(number) for number in layers)
    names = "|".join(re.escape(ending) for ending in endings)
    return rf"\D*\.(?:{numbers})\.(?:.*\.)?(?:{names})"
