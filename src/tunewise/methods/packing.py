"""Packing: several documents share a row, so that no position is wasted on padding."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from tunewise.errors import Conflict
from tunewise.layers.head import base_model_of
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, PositiveInt, Recipe, Slot

_STATE_MARKS = ("linear", "mamba", "recurrent", "conv", "ssm")
"""What configurations call layers whose state runs on from token to token, and so from document to
document."""

# fmt: off
_STATE_MODELS = frozenset((
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h",
    "plamo2", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
))
# fmt: on
"""Model types with such layers whose configuration does not name layer types."""


class Packing(Method):
    """Documents of one step lie in rows of `row_tokens` positions, best fit first; positions restart with
    each.

    Formula: loss = sum of CE over supervised tokens / their number, whatever the rows; attention and positions stay
    inside a document.

    Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027). When to
    use: documents of different lengths; padding is computed for nothing. When not: all documents are as long as the
    row, or the model carries a state along the row (refused).

    Attributes:
        row_tokens: length of a row; a longer document gets a row of its own. `tunewise.methods.complete`
            fills it in.
        pad_to: row lengths are rounded up to a multiple of this: matrix units like it, and a kernel library keeps a
            kernel for every length that it meets.
    """

    name: ClassVar[str] = "packing"
    slot: ClassVar[Slot] = Slot.DATA
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    row_tokens: PositiveInt | None = None
    pad_to: PositiveInt = 64

    def conflict(self, recipe: Recipe) -> str | None:
        """Virtual tokens stand once in front of a row, not in front of each document."""
        peft = next((method for method in recipe.methods or () if method.name == "peft"), None)
        if getattr(peft, "is_prompt_learning", False):
            return (
                "packing puts several documents into a row, and this peft method puts its virtual tokens "
                "only in front of the first one; leave packing out"
            )
        return None

    def apply(self, run: Run) -> None:
        """Set the layout.

        Raises:
            Conflict: the model carries state from one document to the next.
        """
        if self.row_tokens is None:
            raise ValueError("packing.row_tokens is not set; pass the recipe through tunewise.methods.complete first")
        model = base_model_of(run.model)
        config = model.config.get_text_config()
        layer_types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
        carrying = sorted(kind for kind in set(layer_types) if any(mark in kind for mark in _STATE_MARKS))
        if carrying or config.model_type in _STATE_MODELS:
            what = f"layers of the type '{carrying[0]}'" if carrying else f"the layers of '{config.model_type}'"
            raise Conflict(
                f"packing: {what} in {type(model).__name__} carry state from one document of a row into the "
                "next. Leave packing out."
            )
        run.layout = replace(run.layout, row_tokens=self.row_tokens, pad_to=self.pad_to)
