"""Masks of tensors without values, of which it is known that they mark everything.

The size of `values[mask]` is the number of the mask's ones, which fake tensors do not know, so torch raises an error.
Some of peft's kinds make such masks, whose ones are all there; for their modules only, and in dry runs only, this is
the answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

KINDS = frozenset(("UNILORA", "WAVEFT"))
"""UNILORA marks the shared values that are used anywhere, WAVEFT the frequencies inside the padded weight."""


class FullMasks(TorchDispatchMode):
    """Takes each mask of one dimension for one that marks everything."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.bincount.default:
            minlength = args[2] if len(args) > 2 else (kwargs or {})["minlength"]
            return args[0].new_empty(minlength)
        if func in (aten.index.Tensor, aten.index_put_.default):
            args = (args[0], [_numbered(index) for index in args[1]], *args[2:])
        return func(*args, **(kwargs or {}))


def _numbered(index: Tensor | None) -> Tensor | None:
    """Return the numbers that a mask stands for; other indices as they are."""
    if index is None or index.dtype != torch.bool or index.ndim != 1:
        return index
    return index.new_empty(index.numel(), dtype=torch.int64)


def answer_in_forward(model: nn.Module) -> None:
    """Answer while the modules that hold a peft adapter (their class names its layers) compute."""
    masks = FullMasks()

    def enter(module: nn.Module, arguments: Any) -> None:
        del module, arguments
        masks.__enter__()

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        del module, arguments, output
        masks.__exit__(None, None, None)

    for module in model.modules():
        if hasattr(module, "adapter_layer_names"):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)
