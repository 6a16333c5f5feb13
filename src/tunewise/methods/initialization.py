"""How weights start when a model is trained from scratch."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from tunewise.layers.initialization import InitKind, initialize
from tunewise.layers.linear import linear_layers, weight_of
from tunewise.methods.low_rank import derived_seed
from tunewise.methods.method import Run
from tunewise.methods.quantization import Quantize
from tunewise.recipe import Fidelity, Method, PositiveInt, Recipe, Slot

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Initialize(Method):
    """First values of all linear layers (Goodfellow et al. 2016, "Deep Learning", section 8.4); biases start at zero.

    Formula, for n outputs and m inputs: normal N(0, std^2); uniform U(+-1/sqrt(m)); glorot U(+-sqrt(6/(m + n))); he
    N(0, 2/m); orthogonal (Saxe et al. 2013); sparse: `num_nonzero` weights of each output, N(0, 1/num_nonzero)
    (Martens 2010). Embeddings, norms and the head keep the architecture's own.

    Source: Goodfellow et al. 2016, "Deep Learning", section 8.4; Glorot and Bengio 2010; He et al. 2015 (arXiv
    1502.01852). When to use: training from scratch, when the architecture's own initialization (mostly normal,
    0.02) learns slowly. When not: weights are pretrained; it would destroy them (refused).

    Attributes:
        kind: see above; "glorot" keeps the variance of activations and gradients alike.
        gain: factor on all values.
        std: deviation of "normal".
        num_nonzero: of "sparse".
    """

    name: ClassVar[str] = "initialize"
    slot: ClassVar[Slot] = Slot.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    kind: InitKind = "glorot"
    gain: Positive = 1.0
    std: Positive = 0.02
    num_nonzero: PositiveInt = 15

    def conflict(self, recipe: Recipe) -> str | None:
        """Pretrained weights must stay; what an adapter is saved without must be found again."""
        if recipe.model.weights != "random":
            return "initialize would overwrite the pretrained weights; set model.weights to random, or leave it out"
        parts = (*recipe.in_slot(Slot.ADAPTER), recipe.get(Quantize))
        part = next((each for each in parts if each is not None and each.name != "freeze"), None)
        if part is not None:
            return (
                f"initialize draws the base, and what is trained beside it with {part.name} is saved without it, so "
                "that nobody could load the result; leave one of them out"
            )
        return None

    @torch.no_grad()
    def apply(self, run: Run) -> None:
        """Draw the weights; each layer's depend on the recipe's seed and its name only."""
        layers = linear_layers(run.model)
        for name, layer in layers.items():
            generator = torch.Generator().manual_seed(derived_seed(run.recipe.seed, f"initialize:{name}"))
            initialize(
                weight_of(layer),
                self.kind,
                generator,
                gain=self.gain,
                std=self.std,
                num_nonzero=self.num_nonzero,
            )
            if isinstance(layer.bias, torch.Tensor):
                layer.bias.zero_()
        run.say(f"{self.kind} initialization of {len(layers)} linear layers")
