"""FP8-LM's optimizer: gradients, moments and master weights in 8 and 16 bits, each format by itself."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from tunewise.errors import Conflict
from tunewise.layers.fp8_lm import FP8LMAdamW
from tunewise.layers.scaled_numbers import NumberFormat
from tunewise.methods.method import ParameterGroup, Run
from tunewise.methods.optimizers import AdamLike
from tunewise.methods.precision import Precision
from tunewise.recipe import PositiveInt, Recipe


class FP8LM(AdamLike):
    """AdamW in 6 bytes a parameter instead of 16 (Peng et al. 2023, arXiv 2310.18313): FP8 gradient and first moment,
    FP16 second moment and master weight, all with a scale a tensor.

    Formula: stored = round(x 2^k), one k a tensor; gradients of one step share the scale mu 2^k of its first micro-
    batch, mu halves when more than `threshold` of the numbers overflowed and doubles within `window` steps
    otherwise. Weights to compute with come on top: choose `precision: {compute: bf16, trainable: same}` (8 bytes a
    parameter in all, against 16 + 2). Leave `second_moment` at fp16: in FP8 it is measurably worse
    (`benchmarks/fp8_lm/run.py`, the paper's decoupling), because a second moment changes by a thousandth a step and
    FP8 has steps of an eighth.

    Source: Peng et al. 2023, "FP8-LM" (arXiv 2310.18313), sections 2.1 and 2.2. When to use: full fine-tuning and
    training from scratch. When not: with LoRA, where these bytes are few.

    Attributes:
        gradient: format in which gradients wait for the update; what the parameters are stored in keeps autograd's own.
        first_moment: format of the first moment. "fp8" is E4M3; fp8 and fp16 come with a scale.
        second_moment: format of the second moment.
        master: format of the weights that the update is added to.
        threshold: share of overflowed numbers above which mu is halved.
        window: steps in which mu doubles.
    """

    name: ClassVar[str] = "fp8_lm"

    gradient: NumberFormat = "fp8"
    first_moment: NumberFormat = "fp8"
    second_moment: NumberFormat = "fp16"
    master: NumberFormat = "fp16"
    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    window: PositiveInt = 1000

    def conflict(self, recipe: Recipe) -> str | None:
        """Masters must not be kept twice, and stored gradients must be there all together."""
        precision = recipe.get(Precision)
        if precision is not None and precision.compute == "fp16":
            return (
                "fp8_lm scales gradients itself, fp16's loss scaling would be in its way; use precision.compute: bf16"
            )
        if precision is not None and precision.compute == "bf16" and precision.trainable == "fp32":
            return (
                "fp8_lm keeps master weights of its own, and precision would keep fp32 ones besides; set "
                "precision.trainable to same"
            )
        if self.in_backward and self.gradient != "fp32":
            return "fp8_lm.in_backward keeps no gradients, so there is nothing to store; set fp8_lm.gradient to fp32"
        return super().conflict(recipe)

    def apply(self, run: Run) -> None:
        """Set the optimizer.

        Raises:
            Conflict: the device has no FP8 numbers (MPS).
        """
        if run.device.type == "mps":
            raise Conflict("fp8_lm: this device has no FP8 numbers. Use adamw_8bit, or another device.")
        super().apply(run)

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return our FP8-LM optimizer."""
        return FP8LMAdamW(
            groups,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            gradient=self.gradient,
            first_moment=self.first_moment,
            second_moment=self.second_moment,
            master=self.master,
            threshold=self.threshold,
            window=self.window,
        )
