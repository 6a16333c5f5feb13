"""After training, without training: the mean of several states of one run, or of several runs from one base.

    W = W_0 + (1 / N) sum_i (W_i - W_0)

Averages of fine-tuned models lie in the same wide basin and often do better than each ("model soups", Wortsman et al.
2022, arXiv 2203.05482), and the average of checkpoints forgets less. The mean of LoRA updates is not the product of the
mean factors: here the exact mean, of rank N x rank, is brought back to the layer's rank by its singular values, and how
much of it that loses is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tunewise.engine.state import trainable_of
from tunewise.errors import CheckpointError, Conflict
from tunewise.layers.lora import is_plain, lora_layers
from tunewise.methods.method import Run


@torch.no_grad()
def average(run: Run, states: Sequence[Mapping[str, Tensor]]) -> float:
    """Put the mean of `states` (tensors of checkpoints of the same parameters) into `run`.

    Returns:
        The largest share of a layer's update that its rank could not hold: the norm of what was cut off by the norm of
        the exact mean, 0 to 1.

    Raises:
        CheckpointError: a state belongs to other parameters.
        Conflict: PiSSA's factors are not those of the update.
    """
    held = [trainable_of(state) for state in states]
    present = dict(run.trainable())
    for values in held:
        if values.keys() != present.keys() or any(values[n].shape != p.shape for n, p in present.items()):
            raise CheckpointError("Only states of the same parameters can be averaged; one of these has others.")
    lost = 0.0
    factors: set[str] = set()
    for name, layer in lora_layers(run.model).items():
        if layer.initial_a is not None or not is_plain(layer):
            raise Conflict("Only updates B A of the weights have a mean, which lora has (not with init 'pissa').")
        name_a, name_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        a_RI, b_OR, share = mean_product([(v[name_a].float(), v[name_b].float()) for v in held], layer.rank)
        layer.lora_A.weight.copy_(a_RI)
        layer.lora_B.weight.copy_(b_OR)
        factors |= {name_a, name_b}
        lost = max(lost, share)
    for name, parameter in present.items():
        if name not in factors:
            parameter.copy_(torch.stack([values[name].double() for values in held]).mean(0))
    return lost


def mean_product(factors: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor, float]:
    """Return (A, B) of `rank` whose product is nearest to the mean of all B_i A_i, and the share that is cut off.

    The singular values are those of a small matrix: with [B_1 ... B_N] = Q R and [A_1; ...; A_N]^T = P S the mean is
    Q (R S^T / N) P^T, so nothing of size (out_features, in_features) is made.

    Args:
        factors: (A of shape (rank, in_features), B of shape (out_features, rank)) of each update, in fp32.
        rank: of the result.
    """
    stacked_a = torch.cat([a for a, _ in factors]).double()
    stacked_b = torch.cat([b for _, b in factors], dim=1).double()
    q_b, r_b = torch.linalg.qr(stacked_b)
    q_a, r_a = torch.linalg.qr(stacked_a.T)
    left, singular, right = torch.linalg.svd(r_b @ r_a.T / len(factors), full_matrices=False)
    kept = min(rank, len(singular))  # a rank above the matrix's own is filled up with zeros
    root = singular[:kept].sqrt()
    a_RI, b_OR = stacked_a.new_zeros((rank, stacked_a.shape[1])), stacked_b.new_zeros((stacked_b.shape[0], rank))
    a_RI[:kept], b_OR[:, :kept] = root[:, None] * (right[:kept] @ q_a.T), q_b @ left[:, :kept] * root
    whole, cut = float(singular.norm()), float(singular[rank:].norm())
    return a_RI.float(), b_OR.float(), cut / whole if whole else 0.0
