"""Cross entropy plus beta times the divergence from the base model, over supervised positions, chunk by chunk.

    sum over supervised tokens of  -log p(label)  +  beta * KL(p_base || p)

The base is the same model with its adapter switched off, so no second model is in memory; never more than two
(chunk_tokens, V) matrices of logits exist. The gradient at the model's logits is
(1 + beta) p - onehot - beta p_base.

Shape suffixes: T supervised tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tunewise.layers.head import CausalHead

Off = Callable[[], AbstractContextManager[None]]
"""Makes a context within which the model is its own base."""


def loss_and_kl(
    hidden_TD: Tensor,
    base_hidden_TD: Tensor,
    labels_T: Tensor,
    head: CausalHead,
    off: Off,
    beta: float,
    chunk_tokens: int,
) -> Tensor:
    """Return the sum, a differentiable scalar in fp32 (or the hidden states' dtype if wider).

    Each chunk's logits are made again in backward, so they are not kept.

    Args:
        hidden_TD: the model's last hidden states at supervised positions.
        base_hidden_TD: the base's, without gradient.
        labels_T: the tokens to be predicted there.
        head: makes logits of hidden states.
        off: switches the adapter off, for heads that are adapted.
        beta: weight of the divergence.
        chunk_tokens: logits are made for so many tokens at once.
    """

    def of_chunk(hidden_CD: Tensor, base_hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        with off(), torch.no_grad():
            base_logp_CV = _log_probabilities(head, base_hidden_CD)
        logp_CV = _log_probabilities(head, hidden_CD)
        cross_entropy = functional.nll_loss(logp_CV, labels_C, reduction="sum")
        divergence = functional.kl_div(logp_CV, base_logp_CV, reduction="sum", log_target=True)
        return cross_entropy + beta * divergence

    total = hidden_TD.sum(dtype=_wide(hidden_TD.dtype)) * 0
    parts = (tensor.split(chunk_tokens) for tensor in (hidden_TD, base_hidden_TD, labels_T))
    for hidden_CD, base_hidden_CD, labels_C in zip(*parts, strict=True):
        if len(labels_C) > 0:
            part: Tensor = checkpoint(of_chunk, hidden_CD, base_hidden_CD, labels_C, use_reentrant=False)
            total = total + part
    return total


def _log_probabilities(head: CausalHead, hidden_CD: Tensor) -> Tensor:
    logits_CV = head.logits(hidden_CD)
    return logits_CV.to(_wide(logits_CV.dtype)).log_softmax(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
