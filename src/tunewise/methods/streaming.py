"""Layer streaming: a frozen base that is larger than the device's memory."""

from __future__ import annotations

from typing import ClassVar

from transformers.modeling_layers import GradientCheckpointingLayer

from tunewise.errors import Conflict
from tunewise.layers.head import base_model_of
from tunewise.layers.streaming import Source, Streamer, blocks_of
from tunewise.methods.checkpointing import Checkpointing
from tunewise.methods.lora import LoRA
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, Recipe, Slot
from tunewise.workload.places import user_path


class Stream(Method):
    """Keep the frozen weights of all blocks on a disk or in the host's memory; a block comes for its forward pass and
    again for its backward pass, and only one is there at a time (two on CUDA, where the next one is fetched meanwhile).

    Formula: loss and gradients are the resident model's, bit for bit. A step reads all blocks twice, packed ones in
    packed form, so `quantize` makes it four to eight times cheaper. Embeddings and head stay resident. Written for
    CUDA too, where it has not been measured.

    Source: Rajbhandari et al. 2021, "ZeRO-Infinity" (arXiv 2104.07857); Sheng et al. 2023, "FlexGen" (2303.06865),
    both for weights that wait elsewhere. When to use: with LoRA, when the frozen weights do not fit and nothing
    else helps; large micro-batches pay for the reading. When not: the weights fit.

    Attributes:
        source: "disk" or "host"; the host's memory is elsewhere only for a GPU.
        folder: where the blocks' files go ("disk" only); None: the system's folder for temporary files, which may be a
            RAM disk. They are removed when the process ends (a killed one
            leaves them).
    """

    name: ClassVar[str] = "stream"
    slot: ClassVar[Slot] = Slot.STORAGE
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    source: Source = "disk"
    folder: str | None = None

    def conflict(self, recipe: Recipe) -> str | None:
        """Blocks must be frozen, be computed again in backward, and be wrapped without being read."""
        checkpointing, lora = recipe.get(Checkpointing), recipe.get(LoRA)
        if lora is None or len(recipe.in_slot(Slot.ADAPTER)) > 1:
            return "stream keeps the blocks' weights elsewhere, so only adapters beside them can learn; use lora, alone"
        if lora.init in ("pissa", "loftq"):
            return f"lora's init '{lora.init}' reads the base weights, which stream keeps elsewhere; use init 'kaiming'"
        if checkpointing is None or checkpointing.every != 1:
            return (
                "stream lets a block's weights go after its forward pass, so every block must be computed again in "
                "backward; add checkpointing with every: 1"
            )
        if self.source == "host" and recipe.device == "cpu":
            return "stream: on a CPU the weights are in the host's memory anyway; set stream.source to disk"
        if self.source == "host" and self.folder is not None:
            return "stream.folder belongs to disk; leave it out, or set stream.source to disk"
        return None

    def apply(self, run: Run) -> None:
        """Prepare the streamer; `quantize` and the engine's build give it the weights.

        Raises:
            Conflict: the architecture has no blocks.
            StorageError: there is no place for the files.
        """
        blocks = blocks_of(base_model_of(run.model), GradientCheckpointingLayer)
        if not blocks:
            raise Conflict(f"stream: {type(run.model).__name__} has no blocks that transformers can checkpoint.")
        folder = None if self.folder is None else user_path(self.folder)
        run.streamer = Streamer(blocks, self.source, run.device, folder)
