"""Adam with less memory for its moments: 4 bits each, one second moment a row, or moments of a low-rank image."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tunewise.layers.adam_mini import AdamMini as AdamMiniRule
from tunewise.layers.adamw_4bit import AdamW4bit as AdamW4bitRule
from tunewise.layers.apollo import Apollo as ApolloRule
from tunewise.methods.method import ParameterGroup, Run
from tunewise.methods.optimizers import AdamLike
from tunewise.recipe import NonNegative, PositiveInt


class AdamW4bit(AdamLike):
    """AdamW with 4-bit moments, 1.03 bytes a parameter for both (Li et al. 2023, arXiv 2309.01507).

    First moment: blocks of 128 and the signed dynamic map; second moment: rank-1 scales, levels k/16 without zero.

    Formula: m = Q(b1 m + (1 - b1) g), v = Q(b2 v + (1 - b2) g^2), W -= lr (m^ / (sqrt(v^) + eps) + wd W), where Q
    rounds to the levels. On noisy gradients it ends a quarter of the way off AdamW's point where 8-bit moments end
    a twentieth off (`pytest tests/unit/layers`), so compare validation losses.

    Source: Li et al. 2023, "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507), sections 3 and 4.
    When to use: full fine-tuning when 8-bit moments (2.03 bytes) still do not fit. When not: with LoRA, whose
    moments are small anyway; it unpacks and packs each tensor, so a step takes longer.
    """

    name: ClassVar[str] = "adamw_4bit"

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return our 4-bit AdamW."""
        return AdamW4bitRule(groups, betas=(self.beta1, self.beta2), eps=self.eps)


class AdamMini(AdamLike):
    """AdamW with one second moment for a whole row of a matrix (Zhang et al. 2024, arXiv 2406.16793).

    Formula: v = b2 v + (1 - b2) mean(g^2 over the row), everything else as in AdamW; 4 bytes a parameter instead of 8.
    Query and key have a row each where the paper takes a head; a vector shares one.

    Source: Zhang et al. 2024, "Adam-mini" (arXiv 2406.16793), algorithm 1. When to use: full fine-tuning at AdamW's
    own learning rate. When not: 8-bit moments are at hand and memory is all that matters: they take 2.03 bytes.
    """

    name: ClassVar[str] = "adam_mini"

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return our Adam-mini."""
        return AdamMiniRule(groups, betas=(self.beta1, self.beta2), eps=self.eps)


class Apollo(AdamLike):
    """The gradient itself, scaled as Adam scales its random low-rank image (Zhu et al. 2024, arXiv 2412.05270).

    Formula: R = P G with r random rows, s_j = |Adam(R)_j| / |R_j|, W -= lr alpha (G diag(s)); the update's norm
    grows by 1 % a step at most. Moments take 2 r numbers a column instead of two a weight: rank 1 with `scale:
    tensor` (APOLLO-Mini) is about SGD's memory. GaLore (arXiv 2403.03507) was not built: it needs a decomposition
    of every matrix every 200 steps for updates of low rank.

    Source: Zhu et al. 2024, "APOLLO" (arXiv 2412.05270), algorithm 1. When to use: full fine-tuning and pre-
    training of large matrices. When not: with LoRA, whose matrices are of low rank themselves (they get plain AdamW
    when the rank is no larger).

    Attributes:
        rank: rows of the projection.
        scale: "channel" scales each column (along the larger side) by itself, "tensor" all of it alike.
        alpha: factor on the update; None: 1 for channels, sqrt(128) for tensors (the paper's).
        update_every: steps after which a new projection is drawn.
    """

    name: ClassVar[str] = "apollo"

    rank: PositiveInt = 256
    scale: Literal["channel", "tensor"] = "channel"
    alpha: NonNegative | None = None
    update_every: PositiveInt = 200

    def apply(self, run: Run) -> None:
        """Set the optimizer; its projections depend on the recipe's seed."""
        super().apply(run)
        run.make_optimizer = lambda groups: self._made(groups, run.recipe.seed)

    def make(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Return our APOLLO with projections of seed 0."""
        return self._made(groups, 0)

    def _made(self, groups: list[ParameterGroup], seed: int) -> torch.optim.Optimizer:
        is_channelwise = self.scale == "channel"
        alpha = self.alpha if self.alpha is not None else (1.0 if is_channelwise else 128**0.5)
        return ApolloRule(
            groups,
            rank=self.rank,
            is_channelwise=is_channelwise,
            alpha=alpha,
            update_every=self.update_every,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            seed=seed,
        )
