"""Which rule turns gradients into updates; learning rate and weight decay come with the parameter groups.

Formulas as in Goodfellow, Bengio, Courville, "Deep Learning" (2016), chapter 8, and the papers named at each
class.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from tunewise.errors import Conflict
from tunewise.layers import optimizers
from tunewise.methods.method import ParameterGroup, Run
from tunewise.recipe import Fidelity, Method, Recipe, Slot

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Epsilon = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Optimizer(Method):
    """What all optimizers share.

    Attributes:
        in_backward: update each parameter as soon as its gradient is there and free the gradient, so that all
            gradients are never in memory together (LOMO, Lv et al. 2023, arXiv 2306.09782). Needs one
            micro-batch a step and no clipping of the gradients' norm, since no moment knows all of them.
    """

    slot: ClassVar[Slot] = Slot.OPTIMIZER
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    in_backward: bool = False

    def conflict(self, recipe: Recipe) -> str | None:
        """Say why updates in backward are impossible here."""
        if not self.in_backward:
            return None
        batch = recipe.batch
        if recipe.training.max_grad_norm is not None:
            return (
                f"{self.name}.in_backward updates before all gradients are known, so their norm cannot be "
                "clipped; set training.max_grad_norm to null"
            )
        is_split = None not in (batch.documents, batch.micro_batch_size) and batch.documents != batch.micro_batch_size
        if (batch.gradient_accumulation_steps or 1) > 1 or (is_split and not recipe.in_slot(Slot.DATA)):
            return (
                f"{self.name}.in_backward keeps no gradients, so they cannot be accumulated; set "
                "batch.gradient_accumulation_steps to 1 and batch.micro_batch_size to batch.documents"
            )
        if next(
            (method for method in recipe.in_slot(Slot.PRECISION) if getattr(method, "compute", "") == "fp16"),
            None,
        ):
            return f"{self.name}.in_backward cannot unscale fp16 gradients; set precision.compute to bf16"
        return None

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return the optimizer for these parameter groups."""
        raise NotImplementedError

    def apply(self, run: Run) -> None:
        """Set the optimizer."""
        run.make_optimizer = self.make
        run.update_in_backward = self.in_backward


class SGD(Optimizer):
    """Stochastic gradient descent (algorithm 8.1), with momentum (8.2) or Nesterov's momentum (8.3).

    torch keeps v / -lr instead of v, which is the same for a constant learning rate; with Nesterov's momentum
    the stored weights are the point at which the gradient is taken. Weight decay is added to the gradient.

    Formula: W -= lr g; with momentum v = a v - lr g, W += v.

    Source: Goodfellow et al. 2016, "Deep Learning", algorithms 8.1 to 8.3; Robbins and Monro 1951, Polyak 1964,
    Nesterov 1983. When to use: no memory for any state is left; convolution-like, well scaled problems. When not:
    transformers' gradients: their sizes differ so much between weights that one rate serves few of them.
    """

    name: ClassVar[str] = "sgd"

    momentum: Beta = 0.0
    nesterov: bool = False

    def conflict(self, recipe: Recipe) -> str | None:
        """Nesterov's variant is one of momentum."""
        if self.nesterov and self.momentum == 0.0:
            return "sgd.nesterov needs momentum; set sgd.momentum, for example to 0.9"
        return super().conflict(recipe)

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return torch's SGD."""
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum, nesterov=self.nesterov)


class Adagrad(Optimizer):
    """Each weight's rate divided by the root of the sum of all its squared gradients (algorithm 8.4).

    Formula: r += g^2, W -= lr g / (sqrt(r) + eps).

    Source: Duchi et al. 2011 (JMLR 12); Goodfellow et al. 2016, "Deep Learning", algorithm 8.4. When to use: rare
    features and short, convex problems. When not: long trainings: the rate only falls.
    """

    name: ClassVar[str] = "adagrad"

    eps: Epsilon = 1e-10

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return torch's Adagrad."""
        return torch.optim.Adagrad(groups, lr=0.0, eps=self.eps)


class RMSProp(Optimizer):
    """Adagrad with a decaying mean of squared gradients (algorithm 8.5); eps stands outside the root.

    Formula: r = d r + (1 - d) g^2, W -= lr g / (sqrt(r) + eps).

    Source: Hinton 2012 (lecture 6e); Goodfellow et al. 2016, "Deep Learning", algorithms 8.5 and 8.6. When to use:
    half of Adam's state is wanted without other changes. When not: the first steps matter: its moment starts at
    zero and is not corrected.

    Attributes:
        decay: rho, the memory of the mean.
        momentum: of the updates; 0 for none.
        nesterov: whether the momentum is Nesterov's (algorithm 8.6); the stored weights are then the point at which
            the gradient is taken.
    """

    name: ClassVar[str] = "rmsprop"

    decay: Beta = 0.99
    momentum: Beta = 0.0
    nesterov: bool = False
    eps: Epsilon = 1e-8

    def conflict(self, recipe: Recipe) -> str | None:
        """Nesterov's variant is one of momentum."""
        if self.nesterov and self.momentum == 0.0:
            return "rmsprop.nesterov needs momentum; set rmsprop.momentum, for example to 0.9"
        return super().conflict(recipe)

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return torch's RMSprop, or ours with Nesterov's momentum."""
        if self.nesterov:
            return optimizers.NesterovRMSprop(groups, 0.0, self.decay, self.momentum, self.eps)
        return torch.optim.RMSprop(groups, lr=0.0, alpha=self.decay, momentum=self.momentum, eps=self.eps)


class AdamLike(Optimizer):
    """Options of Adam's family.

    beta2 = 0.999 remembers some thousand steps, which suits the small batches of fine-tuning; pre-training
    with large batches takes 0.95. Marek et al. 2025 (arXiv 2507.07101): keep beta2's half-life in tokens when
    the batch changes, beta2' = beta2 ** (batch' / batch).
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Epsilon = 1e-8


class Adam(AdamLike):
    """Adaptive moments (Kingma and Ba 2014, arXiv 1412.6980; algorithm 8.7); weight decay is added to the
    gradient.

    Formula: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, W -= lr m^ / (sqrt(v^) + eps), ^ divided by 1 - b^t.

    Source: Kingma and Ba 2014 (arXiv 1412.6980), algorithm 1; Goodfellow et al. 2016, "Deep Learning", algorithm
    8.7. When to use: to compare with results that used it. When not: weights decay: `adamw` decays them evenly.
    """

    name: ClassVar[str] = "adam"

    fused: bool = True

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return torch's Adam."""
        return torch.optim.Adam(groups, lr=0.0, betas=(self.beta1, self.beta2), eps=self.eps, fused=self.fused)


class AdamW(AdamLike):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101).

    Formula: as `adam`, and W -= lr wd W beside it.

    Source: Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2.
    When to use: the default; wherever its two states (8 bytes a trained parameter) fit. When not: everything is
    trained and states fill the memory: `adamw_8bit`, `adafactor`, `fp8_lm`.

    Attributes:
        fused: torch's one kernel for all tensors.
    """

    name: ClassVar[str] = "adamw"

    fused: bool = True

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return torch's AdamW."""
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.beta1, self.beta2), eps=self.eps, fused=self.fused)


class AdamW8bit(AdamLike):
    """AdamW with 8-bit moments; see `tunewise.layers.optimizers.adamw_8bit`.

    Formula: m and v stored as code x scale of a block, codes on a dynamic map; the update is that of `adamw`.

    Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), sections 2 and
    3. When to use: everything is trained and AdamW's states do not fit: 2.03 bytes a parameter instead of 8. When
    not: an adapter is trained: tensors below 4,096 numbers keep fp32 moments, and the rest is small.
    """

    name: ClassVar[str] = "adamw_8bit"

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return bitsandbytes' AdamW.

        Raises:
            MissingBackend: bitsandbytes is not installed.
        """
        return optimizers.adamw_8bit(groups, (self.beta1, self.beta2), self.eps)


class PagedAdamW8bit(AdamLike):
    """AdamW with 8-bit moments in memory that CUDA moves to the host when the device is full.

    Formula: as `adamw_8bit`.

    Source: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), section 3, paged optimizers; bitsandbytes. When to
    use: on a GPU whose memory is full for moments only (long rows now and then). When not: there is no GPU
    (refused), or it is full all the time: then every step waits for the host.
    """

    name: ClassVar[str] = "paged_adamw_8bit"

    def conflict(self, recipe: Recipe) -> str | None:
        """Only CUDA pages."""
        if recipe.device in ("cpu", "mps"):
            return "paged_adamw_8bit needs a CUDA device; use adamw_8bit"
        return super().conflict(recipe)

    def apply(self, run: Run) -> None:
        """Set the optimizer.

        Raises:
            Conflict: the device is not CUDA.
        """
        if run.device.type != "cuda":
            raise Conflict("paged_adamw_8bit needs a CUDA device. Use adamw_8bit.")
        super().apply(run)
        if run.is_dry:  # paged memory cannot be fake; as long as the device has room the moments are there
            run.make_optimizer = partial(optimizers.adamw_8bit, betas=(self.beta1, self.beta2), eps=self.eps)

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return bitsandbytes' paged AdamW.

        Raises:
            MissingBackend: bitsandbytes is not installed.
        """
        return optimizers.adamw_8bit(groups, (self.beta1, self.beta2), self.eps, is_paged=True)


class Adafactor(Optimizer):
    """Second moments as the product of a row and a column (Shazeer and Stern 2018, arXiv 1804.04235,
    algorithm 5).

    torch's implementation: no first moment, and the learning rate is scaled by the root mean square of the
    weights.

    Formula: V ~ (row means)(column means) / mean, u = g / sqrt(V) clipped to RMS 1, W -= max(eps, RMS(W)) min(lr, 1
    / sqrt(t)) u.

    Source: Shazeer and Stern 2018 (arXiv 1804.04235), algorithm 5. When to use: everything is trained and even one
    state a weight is too much. When not: AdamW's quality is needed at AdamW's rates: its rate is another one, and
    it has no momentum.

    Attributes:
        decay: exponent of the second moment's memory, beta2(t) = 1 - t ** decay.
        clip: threshold of the update's root mean square.
    """

    name: ClassVar[str] = "adafactor"

    decay: Annotated[float, Field(le=0.0, ge=-1.0)] = -0.8
    clip: Annotated[float, Field(ge=1.0)] = 1.0

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return torch's Adafactor."""
        return torch.optim.Adafactor(groups, lr=0.0, beta2_decay=self.decay, d=self.clip)


class Lion(Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675); one state instead of Adam's
    two.

    Formula: u = sign(b1 m + (1 - b1) g), m = b2 m + (1 - b2) g, W -= lr (u + wd W).

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2. When
    to use: half of Adam's state, at a rate three to ten times smaller and large batches. When not: small batches:
    the sign makes a noisy gradient as large as a clear one.
    """

    name: ClassVar[str] = "lion"

    beta1: Beta = 0.9
    beta2: Beta = 0.99

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return our Lion."""
        return optimizers.Lion(groups, lr=0.0, betas=(self.beta1, self.beta2))
