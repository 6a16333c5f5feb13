"""Freezing: train only chosen parameters of the model itself, such as biases, norms or the last layers.

BitFit (Ben Zaken et al. 2021, arXiv 2106.10199) is `train: ["*.bias"]`; training the norms is `["*norm*"]`.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Annotated, ClassVar

from pydantic import Field

from tunewise.errors import Conflict, InputError, did_you_mean
from tunewise.layers.linear import PackedLinear
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, Slot
from tunewise.units import format_count

_NUMBER = re.compile(r"\.\d+\.")
"""A layer's number inside a name: left out of error messages, so that they list each kind of name once."""


class Freeze(Method):
    """Train the parameters whose full names match one of the patterns, and none of the others of the base
    model.

    Together with 'lora' both are trained: the matched parameters and the update.

    Formula: gradient of the matched parameters as without it; all others keep their values.

    Source: Ben Zaken et al. 2021, "BitFit" (arXiv 2106.10199), for `train: ["*bias*"]`; Ding et al. 2022, "Delta
    Tuning" (2203.06904), section 3.2. When to use: a few chosen parameters (biases, norms, the last layers) are
    enough, or go beside an adapter. When not: much has to be learnt; a low-rank update of all layers learns more
    for the same memory.

    Attributes:
        train: shell patterns for full parameter names: "*" stands for anything, dots included, "?" for one
            character, "[ab]" for one of these: "*.bias", "*norm*", "model.layers.2[23].*".
    """

    name: ClassVar[str] = "freeze"
    slot: ClassVar[Slot] = Slot.ADAPTER
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    train: Annotated[tuple[str, ...], Field(min_length=1)]

    def apply(self, run: Run) -> None:
        """Set the matched parameters free; the engine has frozen them all.

        Raises:
            InputError: a pattern matches no parameter.
            Conflict: a pattern names a quantized weight, which cannot be trained.
        """
        parameters = dict(run.model.named_parameters(remove_duplicate=False))
        packed = [f"{name}.weight" for name, module in run.model.named_modules() if isinstance(module, PackedLinear)]
        for pattern in self.train:
            matched = [name for name in parameters if fnmatch.fnmatchcase(name, pattern)]
            quantized = fnmatch.filter(packed, pattern)
            if quantized:
                raise Conflict(
                    f"freeze.train: '{pattern}' would train '{quantized[0]}', which is quantized. "
                    "Leave it out, or put its layer into quantize.skip_modules."
                )
            if not matched:
                known = {_NUMBER.sub(".*.", name) for name in parameters}
                hint = did_you_mean(pattern, known)
                raise InputError(f"freeze.train: the pattern '{pattern}' matches no parameter.{hint}")
            for name in matched:
                parameters[name].requires_grad_(True)
        trained = list(run.trainable())
        count = sum(parameter.numel() for _, parameter in trained)
        run.say(
            f"Freeze: {len(trained)} tensors of the base model with {format_count(count)} parameters "
            "are trained, the others are frozen"
        )
