"""Activations that wait for backward elsewhere than on the device."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tunewise.errors import Conflict
from tunewise.layers.activation_offload import DiskFile, OffloadedActivations, PinnedHost, Place
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, PositiveInt, Recipe, Slot
from tunewise.workload.places import user_path


class OffloadActivations(Method):
    """Move what autograd keeps for backward to the host's memory or to a disk, and bring it back when it is needed.

    Formula: gradients are bit-equal: the numbers come back as they were, in the same strides. With `checkpointing`
    it moves the blocks' inputs, which are what is kept then. The path over the host is written for CUDA and has not
    been measured.

    Source: Rhu et al. 2016, "vDNN" (arXiv 1602.08124); torch.autograd.graph.saved_tensors_hooks. When to use:
    activations do not fit and recomputing them is not enough; `host` on a GPU, `disk` on a CPU (on a disk that is
    no RAM disk, as /tmp may be one). When not: memory suffices: every byte is written and read once a step.

    Attributes:
        to: "host" (CUDA: pinned memory, copied beside the computation) or "disk".
        min_bytes: smaller tensors stay where they are.
        folder: where the file goes ("disk" only); None: the system's folder for temporary files. The file has no name
            and dies with the process.
    """

    name: ClassVar[str] = "offload_activations"
    slot: ClassVar[Slot] = Slot.ACTIVATIONS
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    to: Literal["host", "disk"] = "disk"
    min_bytes: PositiveInt = 2**16
    folder: str | None = None

    def conflict(self, recipe: Recipe) -> str | None:
        """On a CPU the host's memory is the device's."""
        if self.to == "host" and recipe.device == "cpu":
            return "offload_activations: on a CPU activations are in the host's memory already; set to: disk"
        if self.to == "disk" and recipe.device in ("cuda", "mps"):
            return "offload_activations: a file is written from a CPU only; on this device set to: host"
        if self.to == "host" and self.folder is not None:
            return "offload_activations.folder belongs to disk; leave it out, or set to: disk"
        return None

    def apply(self, run: Run) -> None:
        """Set the context of forward passes.

        Raises:
            Conflict: `to` does not suit the device.
        """
        if (run.device.type, self.to) not in (("cpu", "disk"), ("cuda", "host")):
            raise Conflict(
                f"offload_activations: to: {self.to} does not work on {run.device.type}; disk serves a CPU, host a "
                "CUDA device."
            )
        device, folder = run.device, None if self.folder is None else str(user_path(self.folder))

        def make_place() -> Place:
            return DiskFile(folder) if self.to == "disk" else PinnedHost(torch.device(device))

        run.saved_tensors = OffloadedActivations(run.model, make_place, self.min_bytes)
