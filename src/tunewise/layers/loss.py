"""The sum of the cross entropies of a micro-batch's supervised tokens: whole, or of supervised positions in
chunks.

`whole_loss` makes the logits of all positions. `supervised_loss` first gathers the hidden states of the
positions that count, then makes logits for a chunk of them at a time and turns each chunk into its loss and
its gradients before the next one: never more than (chunk_tokens, V) logits exist, and for backward only the
gradient of the hidden states (and of a trained head) is kept.

Shape suffixes: R rows, L positions in a row, T supervised tokens, C tokens of a chunk, D hidden size, V
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tunewise.layers.fused import cross_entropy_
from tunewise.layers.head import CausalHead
from tunewise.layers.narrow_head import NarrowHead
from tunewise.layers.native import SUFFIXES as KERNEL_DTYPES
from tunewise.workload.batches import IGNORED

KERNEL_TOKENS = 256
"""At most so many rows of logits for the compiled kernel: products are as fast, and a 49k vocabulary takes 25 MB. Not
where the head is trained: there every chunk adds a gradient of its weight to the others'."""


def whole_loss(logits_RLV: Tensor, labels_RL: Tensor) -> Tensor:
    """Return the sum over supervised positions in nats, computed in fp32 (or the logits' dtype if wider)."""
    logits = logits_RLV.flatten(0, 1).to(_wide(logits_RLV.dtype))
    return F.cross_entropy(logits, labels_RL.flatten(), ignore_index=IGNORED, reduction="sum")


def supervised_loss(
    hidden_RLD: Tensor,
    labels_RL: Tensor,
    head: CausalHead,
    num_supervised: int,
    chunk_tokens: int = 1024,
    use_kernel: bool = False,
    narrow: NarrowHead | None = None,
) -> Tensor:
    """Return the same sum as `whole_loss` of the head's logits.

    Args:
        hidden_RLD: the decoder's last hidden states.
        labels_RL: int64, already shifted, `IGNORED` where nothing is learnt.
        head: makes logits of hidden states.
        num_supervised: how many labels count; known on the host, so that the gather waits for no device and
            has a shape even on fake tensors.
        chunk_tokens: logits are made for so many tokens at once.
        use_kernel: take the compiled kernel for cross entropy (CPU, fp32 or bf16, no softcap), which works in the
            logits' own memory and dtype.
        narrow: make logits and their gradients in 8 bits, where a gradient is wanted: what is only measured is
            measured exactly. For a head that is a frozen `nn.Linear`, without softcap.
    """
    labels_N = labels_RL.flatten()
    index_T = torch.nonzero_static(labels_N != IGNORED, size=num_supervised).squeeze(1)
    hidden_TD = hidden_RLD.flatten(0, 1).index_select(0, index_T)
    labels_T = labels_N.index_select(0, index_T)
    output = head.output
    if type(output) is not nn.Linear:
        return _loss_of_any_head(hidden_TD, labels_T, head, chunk_tokens)
    if not torch.is_grad_enabled():
        return _loss_only(hidden_TD, labels_T, head, chunk_tokens)
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_TD, output.weight, output.bias, labels_T, head.scale, head.softcap, chunk_tokens, use_kernel, narrow
    )
    return loss


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _loss_only(hidden_TD: Tensor, labels_T: Tensor, head: CausalHead, chunk_tokens: int) -> Tensor:
    total = hidden_TD.new_zeros((), dtype=_wide(hidden_TD.dtype))
    for hidden_CD, labels_C in zip(hidden_TD.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True):
        if len(labels_C) > 0:
            total += whole_loss(head.logits(hidden_CD)[None], labels_C[None])
    return total


def _loss_of_any_head(hidden_TD: Tensor, labels_T: Tensor, head: CausalHead, chunk_tokens: int) -> Tensor:
    """For heads that are adapters or quantized: each chunk's logits are made again in backward."""

    def chunk_loss(hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        return whole_loss(head.logits(hidden_CD)[None], labels_C[None])

    total = hidden_TD.sum(dtype=_wide(hidden_TD.dtype)) * 0 if len(labels_T) == 0 else None
    for hidden_CD, labels_C in zip(hidden_TD.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True):
        if len(labels_C) > 0:
            loss: Tensor = checkpoint(chunk_loss, hidden_CD, labels_C, use_reentrant=False)
            total = loss if total is None else total + loss
    assert total is not None
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of a linear head with its gradients, chunk by chunk, all in the forward pass.

    With x = cap * tanh(scale * z / cap), z = W h + b and p = softmax(x), the gradient with respect to z is
    (p - onehot) * (1 - (x / cap)^2) * scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        scale: float,
        softcap: float | None,
        chunk_tokens: int,
        use_kernel: bool,
        narrow: NarrowHead | None,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        device_type, wide = hidden_TD.device.type, _wide(hidden_TD.dtype)
        is_autocast = torch.is_autocast_enabled(device_type)
        compute = torch.get_autocast_dtype(device_type) if is_autocast else hidden_TD.dtype
        total = hidden_TD.new_zeros((), dtype=wide)
        hidden_grad = torch.empty_like(hidden_TD) if needs_hidden else None
        weight_grad = torch.zeros_like(weight_VD, dtype=_wide(weight_VD.dtype)) if needs_weight else None
        bias_grad = torch.zeros_like(bias_V, dtype=_wide(bias_V.dtype)) if needs_bias and bias_V is not None else None
        with torch.autocast(device_type, enabled=False):
            weight = weight_VD.to(compute)
            bias = None if bias_V is None else bias_V.to(compute)
            in_kernel = use_kernel and softcap is None and hidden_TD.is_cpu and compute in KERNEL_DTYPES
            room = None
            if in_kernel or narrow is not None:
                chunk_tokens = chunk_tokens if needs_weight else min(chunk_tokens, KERNEL_TOKENS)
                room = hidden_TD.new_empty(min(chunk_tokens, len(labels_T)), len(weight), dtype=compute)
            for start in range(0, len(labels_T), chunk_tokens):
                part = slice(start, start + chunk_tokens)
                hidden_CD = hidden_TD[part].to(compute)
                if narrow is not None and room is not None:
                    loss, grad_CD = narrow.loss_and_gradient(
                        hidden_CD, labels_T[part], (weight, bias), scale, room[: len(hidden_CD)], in_kernel
                    )
                    total += loss
                    if hidden_grad is not None:
                        hidden_grad[part] = grad_CD
                    continue
                if room is not None:
                    grad_CV = _product(hidden_CD, weight, bias, room[: len(hidden_CD)])
                    loss = cross_entropy_(grad_CV, labels_T[part], scale).sum()
                else:
                    logits_CV = F.linear(hidden_CD, weight, bias).to(wide)
                    loss, grad_CV = _chunk(logits_CV, labels_T[part], scale, softcap)
                total += loss
                grad = grad_CV.to(compute)
                if hidden_grad is not None:
                    hidden_grad[part] = grad @ weight
                if weight_grad is not None:
                    weight_grad += grad.T @ hidden_CD
                if bias_grad is not None:
                    bias_grad += grad_CV.sum(0)
        ctx.gradients = (hidden_grad, weight_grad, bias_grad)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already used; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if part is None else part.mul_(grad).to(dtype)
            for part, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


def _product(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, room_CV: Tensor) -> Tensor:
    """Write the logits into memory that every chunk uses again."""
    torch.mm(hidden_CD, weight_VD.T, out=room_CV)
    return room_CV if bias_V is None else room_CV.add_(bias_V)


def _chunk(logits_CV: Tensor, labels_C: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return (sum of cross entropies, its gradient with respect to `logits_CV`); overwrites `logits_CV`."""
    if scale != 1.0:
        logits_CV.mul_(scale)
    slope_CV = None
    if softcap is not None:
        bounded_CV = logits_CV.div_(softcap).tanh_()
        slope_CV = 1 - bounded_CV.square()
        logits_CV = bounded_CV.mul_(softcap)
    target_C1 = labels_C[:, None]
    log_sum_C1 = logits_CV.logsumexp(1, keepdim=True)
    loss = (log_sum_C1 - logits_CV.gather(1, target_C1)).sum()
    grad_CV = logits_CV.sub_(log_sum_C1).exp_()
    grad_CV.scatter_add_(1, target_C1, torch.full_like(log_sum_C1, -1))
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    return loss, grad_CV.mul_(scale) if scale != 1.0 else grad_CV
