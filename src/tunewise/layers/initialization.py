"""First values of linear layers' weights, for training from scratch.

For a weight of n outputs and m inputs:

    normal       N(0, std^2)
    uniform      U(-1 / sqrt(m), 1 / sqrt(m))
    glorot       U(-sqrt(6 / (m + n)), sqrt(6 / (m + n)))      Glorot and Bengio 2010
    he           N(0, 2 / m)                                   He et al. 2015, arXiv 1502.01852
    orthogonal   random orthonormal rows or columns            Saxe et al. 2013, arXiv 1312.6120
    sparse       k weights of each output N(0, 1 / k), the rest zero   Martens 2010, "Deep learning via Hessian-free"

References:
    Goodfellow, Bengio, Courville 2016, "Deep Learning", section 8.4, which names all but He's; Martens draws N(0, 1)
    for units of k = 15 inputs of size one, the variance 1 / k keeps outputs of unit variance.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

InitKind = Literal["normal", "uniform", "glorot", "he", "orthogonal", "sparse"]


@torch.no_grad()
def initialize(
    weight_OI: Tensor, kind: InitKind, generator: torch.Generator, *, gain: float, std: float, num_nonzero: int
) -> None:
    """Write first values into a weight of shape (out, in), in place.

    Args:
        weight_OI: may be a view (a transposed weight).
        kind: see the module's docstring.
        generator: a CPU generator, so that the values are the same on every device.
        gain: factor on all values.
        std: standard deviation of "normal".
        num_nonzero: weights of each output that "sparse" leaves other than zero, at most as many as there are.
    """
    outputs, inputs = weight_OI.shape
    drawn_OI = torch.empty(outputs, inputs)
    if kind == "normal":
        drawn_OI.normal_(0.0, std, generator=generator)
    elif kind == "he":
        drawn_OI.normal_(0.0, math.sqrt(2.0 / inputs), generator=generator)
    elif kind in ("uniform", "glorot"):
        bound = math.sqrt(6.0 / (inputs + outputs)) if kind == "glorot" else 1.0 / math.sqrt(inputs)
        drawn_OI.uniform_(-bound, bound, generator=generator)
    elif kind == "orthogonal":
        nn.init.orthogonal_(drawn_OI, generator=generator)
    else:
        kept = min(num_nonzero, inputs)
        chosen_OK = torch.rand(outputs, inputs, generator=generator).topk(kept, dim=1).indices
        drawn_OI.zero_().scatter_(1, chosen_OK, torch.randn(outputs, kept, generator=generator) / math.sqrt(kept))
    weight_OI.copy_(drawn_OI.mul_(gain))
