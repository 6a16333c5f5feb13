"""The shape rules of matrix units as automatic padding: vocabulary, LoRA rank, row length."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from tunewise.errors import Conflict
from tunewise.layers.linear import output_head
from tunewise.layers.lora import lora_layers
from tunewise.layers.padding import pad_rank, pad_vocabulary
from tunewise.methods.method import Run
from tunewise.methods.quantization import Quantize
from tunewise.recipe import Fidelity, Method, PositiveInt, Recipe, Slot


class Pad(Method):
    """Round sizes up to multiples that matrix units like: 8 numbers of 16 bits in general, 64 on an A100 and later
    (NVIDIA, "Matrix Multiplication Background" and "Linear/Fully-Connected Layers" guides).

    What is added has probability, value and gradient zero, so loss and gradients of the real entries are those without
    padding (up to the order of sums), and what is saved has the model's own sizes; a padded LoRA is saved with its
    padded rank, zeros included, which is the same adapter. Rules that pool over rows or columns (`adafactor`, `apollo`,
    `adam_mini`) see the zeros; elementwise ones do not.

    Formula: [W 0; 0 0] [x; 0] = [W x; 0], and logits of added words are -infinity.

    Source: NVIDIA, "Matrix Multiplication Background" and "Linear/Fully-Connected Layers" user's guides. When to
    use: a vocabulary such as 50257 or a rank such as 6 on a GPU. When not: sizes are multiples already (then it
    does nothing, and says so); on a CPU measure first.

    Attributes:
        vocabulary: multiple for the rows of the output head; None leaves it.
        rank: multiple for the rank of LoRA; None leaves it.
        length: multiple for the length of unpacked rows (`packing.pad_to` is that of packed ones); None leaves it.
    """

    name: ClassVar[str] = "pad"
    slot: ClassVar[Slot] = Slot.KERNELS
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    vocabulary: PositiveInt | None = 64
    rank: PositiveInt | None = 8
    length: PositiveInt | None = None

    def conflict(self, recipe: Recipe) -> str | None:
        """Packed rows have a multiple of their own, and peft's layers are not ours to change."""
        if self.length is not None and any(method.name == "packing" for method in recipe.methods or ()):
            return "pad.length is for unpacked rows; set packing.pad_to instead and leave pad.length out"
        if any(method.name == "peft" for method in recipe.methods or ()):
            return "pad changes the sizes of our own layers, not of peft's; leave pad out"
        quantize = recipe.get(Quantize)
        if self.vocabulary is not None and quantize is not None and quantize.head_compute == "int8":
            return (
                "pad.vocabulary would change the head of which quantize.head_compute multiplies a copy; set "
                "pad.vocabulary to null"
            )
        nested = next((method.name for method in recipe.methods or () if method.name in ("dylora", "qalora")), None)
        if self.rank is not None and nested is not None:
            return f"pad.rank would add ranks that {nested} draws or shapes in its own way; set pad.rank to null"
        return None

    def apply(self, run: Run) -> None:
        """Pad.

        Raises:
            Conflict: the head cannot be padded, or is trained beside an adapter and would be saved padded.
        """
        said = []
        if self.vocabulary is not None:
            self._refuse_saved_head(run)
            run.undo_padding = pad_vocabulary(run.model, self.vocabulary)
            said += [] if run.undo_padding is None else [f"vocabulary to a multiple of {self.vocabulary}"]
        if self.rank is not None:
            added = [pad_rank(layer, self.rank) for layer in lora_layers(run.model).values()]
            said += [f"rank of {len(added)} LoRA layers to a multiple of {self.rank}"] if any(added) else []
        if self.length is not None:
            run.layout = replace(run.layout, pad_to=self.length)
            said.append(f"rows to a multiple of {self.length}")
        run.say(f"pad: {', '.join(said) if said else 'nothing to pad, every size is a multiple already'}")

    def _refuse_saved_head(self, run: Run) -> None:
        weight = getattr(output_head(run.model), "weight", None)
        if run.recipe.in_slot(Slot.ADAPTER) and weight is not None and weight.requires_grad:
            raise Conflict(
                "pad.vocabulary: the head is trained beside an adapter, whose file would hold the padded rows. Set "
                "pad.vocabulary to null."
            )
