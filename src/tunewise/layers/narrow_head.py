"""Cross entropy whose two products with the output head are made in 8-bit integers (`int8`).

    z ~ h_q W_q^T * s_h s_W        dL/dh ~ (scale * p * s_W)_q W_q - scale * (1 - p[label]) W[label]

The hidden states' rows are rounded to nearest like any layer's. Probabilities are not: most of a large vocabulary's
are smaller than half a step of their row, and to nearest they would all vanish. They are rounded up or down at random,
right on average (stochastic rounding: Gupta et al. 2015, arXiv 1502.02551), to 255 steps of the row's largest but the
label's, whose part of the gradient is exact.

Shape suffixes: C tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunewise.layers.fused import define
from tunewise.layers.int8 import Rows, matmul, matmul_into_, matmul_packed_, pack, quantize_rows
from tunewise.layers.native import call

STEPS = 255
"""Of a row's largest probability; unsigned, so twice as many as in `int8`."""

_ROWS_AT_ONCE = 4096
_GOLDEN, _MIX, _SCRAMBLE, _WORD = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0xFFFFFFFF


def _round(logits_CV: Tensor, labels_C: Tensor, col_scale_V: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    found = _fake_round(logits_CV, labels_C, col_scale_V, scale)
    operands = (logits_CV, labels_C, col_scale_V, *found)
    call("rounded_cross_entropy", logits_CV.dtype, *operands, *logits_CV.shape, scale)
    return found


def _fake_round(
    logits_CV: Tensor, labels_C: Tensor, col_scale_V: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    del labels_C, col_scale_V, scale
    size = (len(logits_CV),)
    row_scale_C, label_grad_C, loss_C = (logits_CV.new_empty(size, dtype=torch.float32) for _ in range(3))
    return row_scale_C, label_grad_C, loss_C


_round_kernel_ = define(
    "rounded_cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor col_scale, float scale) -> "
    "(Tensor, Tensor, Tensor)",
    _round,
    _fake_round,
)


def round_gradient_(
    logits_CV: Tensor, labels_C: Tensor, col_scale_V: Tensor, scale: float, uses_kernel: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn logits into their losses and gradients; what was in `logits_CV` is lost.

    Args:
        logits_CV: contiguous, without `scale`.
        labels_C: int64.
        col_scale_V: fp32, the scale of each row of the head's weight.
        scale: factor on the logits.
        uses_kernel: whether the compiled kernel computes, in the logits' own memory.

    Returns:
        rows_CV: uint8, 0 at the label; rows are dense, but need not follow each other.
        row_scale_C: fp32; row_scale * rows is about scale * softmax(scale * logits) * col_scale.
        label_grad_C: fp32, the gradient of the label's logit.
        loss_C: fp32, in nats.
    """
    if uses_kernel:
        row_scale_C, label_grad_C, loss_C = _round_kernel_(logits_CV, labels_C, col_scale_V, scale)
        return logits_CV.view(torch.uint8)[:, : logits_CV.shape[1]], row_scale_C, label_grad_C, loss_C
    label_C1 = labels_C[:, None]
    target_C1 = logits_CV.gather(1, label_C1).float()
    wide_CV = logits_CV.float() * scale
    log_sum_C1 = wide_CV.logsumexp(1, keepdim=True)
    loss_C = (log_sum_C1 - target_C1 * scale).squeeze(1)
    number_CV = (wide_CV - log_sum_C1).exp_().mul_(col_scale_V).scatter_(1, label_C1, 0.0)
    top_C1 = number_CV.amax(1, keepdim=True)
    number_CV.mul_(torch.where(top_C1 > 0, STEPS / top_C1, 0.0))
    rows_CV = number_CV.add_(_places(target_C1, number_CV.shape[1])).clamp_(max=STEPS).nan_to_num_().to(torch.uint8)
    return rows_CV, (top_C1 * (scale / STEPS)).squeeze(1), scale * torch.expm1(-loss_C), loss_C


def _places(target_C1: Tensor, size: int) -> Tensor:
    """Return what is added to a number before its digits after the point are cut, (C, V) in [0, 1).

    A row begins where its label's logit and its own place say and goes on in multiples of the golden ratio, which fill
    the interval evenly: the same numbers in every run, and on average a half.
    """
    token_C1 = torch.arange(len(target_C1), device=target_C1.device)[:, None]
    key_C1 = target_C1.view(torch.int32).long() & _WORD
    key_C1 = ((key_C1 ^ (token_C1 * _MIX & _WORD)) * _SCRAMBLE) & _WORD
    key_C1 = key_C1 ^ (key_C1 >> 16)
    step_V = torch.arange(size, device=target_C1.device) * _GOLDEN & _WORD
    return ((key_C1 + step_V & _WORD) >> 8).float() * 2.0**-24


@dataclass(frozen=True, eq=False)
class NarrowHead:
    """A copy in 8 bits of a frozen output head's weight.

    Attributes:
        weight_VD: int8; None where it is kept as panels.
        scale_V: fp32, of each row.
        panels: the weight in the order of the compiled kernel, for logits and for the hidden states' gradient: a chunk
            of tokens meets all of it, and to order it anew takes a tenth of their products.
    """

    weight_VD: Tensor | None
    scale_V: Tensor
    panels: tuple[Tensor, Tensor] | None = None

    @staticmethod
    @torch.no_grad()
    def of(output: nn.Linear, packs: bool = False) -> NarrowHead:
        """Round the weight of `output`, some rows at a time; with `packs` for the compiled kernel alone."""
        weight_VD = output.weight.detach()
        narrow_VD = torch.empty_like(weight_VD, dtype=torch.int8)
        scale_V = weight_VD.new_empty(len(weight_VD), dtype=torch.float32)
        for start in range(0, len(weight_VD), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            narrow_VD[part], scale_V[part] = quantize_rows(weight_VD[part], False)
        if not packs:
            return NarrowHead(narrow_VD, scale_V)
        return NarrowHead(None, scale_V, (pack(narrow_VD, False, False), pack(narrow_VD, True, True)))

    @property
    def stored_bytes(self) -> int:
        """What the copy takes in memory."""
        return sum(held.nbytes for held in (self.weight_VD, self.scale_V, *(self.panels or ())) if held is not None)

    def _logits_(self, out_CV: Tensor, hidden: Rows, uses_kernel: bool) -> None:
        if self.panels is not None:
            matmul_packed_(out_CV, *hidden, self.panels[0], self.scale_V)
        else:
            assert self.weight_VD is not None
            matmul_into_(out_CV, hidden, self.weight_VD, self.scale_V, uses_kernel)

    def _gradient(self, rows: Rows, dtype: torch.dtype, size: int, uses_kernel: bool) -> Tensor:
        if self.panels is not None:
            grad_CD = rows[1].new_empty(len(rows[1]), size, dtype=dtype)
            matmul_packed_(grad_CD, *rows, self.panels[1], None)
            return grad_CD
        assert self.weight_VD is not None
        return matmul(rows, self.weight_VD, None, dtype, uses_kernel, by_columns=True)

    def loss_and_gradient(
        self,
        hidden_CD: Tensor,
        labels_C: Tensor,
        output: tuple[Tensor, Tensor | None],
        scale: float,
        room_CV: Tensor,
        uses_kernel: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the cross entropies in fp32 and its gradient with respect to `hidden_CD`.

        Args:
            hidden_CD: in the dtype of computation, fp32 or bf16.
            labels_C: int64.
            output: the head's own weight (V, D), for the label's exact part, and bias, in that dtype.
            scale: factor on the logits.
            room_CV: contiguous memory for the logits, in that dtype.
            uses_kernel: whether the compiled kernels compute, or torch's own operations, which need `weight_VD`.
        """
        weight_VD, bias_V = output
        self._logits_(room_CV, quantize_rows(hidden_CD, uses_kernel), uses_kernel)
        if bias_V is not None:
            room_CV.add_(bias_V)
        rows_CV, row_scale_C, label_grad_C, loss_C = round_gradient_(
            room_CV, labels_C, self.scale_V, scale, uses_kernel
        )
        grad_CD = self._gradient((rows_CV, row_scale_C), hidden_CD.dtype, hidden_CD.shape[1], uses_kernel)
        grad_CD.addcmul_(weight_VD.index_select(0, labels_C), label_grad_C[:, None].to(grad_CD.dtype))
        return loss_C.sum(), grad_CD
