"""Modules that stand in another one's place, and how that one comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Twin(nn.Module):
    """A module in another one's place, with its children and parameters under their own names."""

    def __init__(self, original: nn.Module | None) -> None:
        super().__init__()
        self._hidden_original = (original,)  # in a tuple, so that its children are not there twice

    def original(self) -> nn.Module:
        """Return the module that stood here, with the children and parameters of today (merging replaces some)."""
        (original,) = self._hidden_original
        if original is None:
            return self
        for name, child in self.named_children():
            setattr(original, name, child)
        for name, parameter in self.named_parameters(recurse=False):
            setattr(original, name, parameter)
        return original.train(self.training)


@contextmanager
def own_modules(model: nn.Module) -> Iterator[None]:
    """Put a model's own modules back for as long as the context lasts: it computes what it will when it is loaded."""
    twins = [(name, module) for name, module in model.named_modules() if isinstance(module, Twin)]
    for name, twin in twins:
        model.set_submodule(name, twin.original())
    try:
        yield
    finally:
        for name, twin in twins:
            model.set_submodule(name, twin)
