"""The divergence from the base, in chunks, against the plain formula over everything."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from tests.unit.layers.test_loss import HEADS, make_head
from tunewise.layers.head import CausalHead
from tunewise.layers.kl import loss_and_kl


def plain(hidden_TD: Tensor, base_TD: Tensor, labels_T: Tensor, head: CausalHead, beta: float) -> Tensor:
    """Write the sums out: -log p(label) + beta sum_v p_base(v) (log p_base(v) - log p(v))."""
    probabilities_TV = head.logits(hidden_TD).softmax(-1)
    base_TV = head.logits(base_TD).softmax(-1).detach()
    cross_entropy = -probabilities_TV[torch.arange(len(labels_T)), labels_T].log().sum()
    return cross_entropy + beta * (base_TV * (base_TV.log() - probabilities_TV.log())).sum()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_equals_the_plain_formula(kind: str, chunk_tokens: int, beta: float) -> None:
    head = make_head(kind, bias=True)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    base = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 7, (9,), generator=generator)
    ours = loss_and_kl(hidden, base, labels, head, nullcontext, beta, chunk_tokens)
    theirs = plain(hidden, base, labels, head, beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (our_gradient,), (their_gradient,) = (torch.autograd.grad(loss, hidden) for loss in (ours, theirs))
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-10, atol=1e-12)


def test_the_gradient_at_the_logits_is_the_closed_form() -> None:
    """(1 + beta) p - onehot - beta p_base, as the file's docstring says."""
    identity = nn.Linear(7, 7, bias=False, dtype=torch.float64)
    nn.init.eye_(identity.weight)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    base, labels, beta = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 3, 6, 3, 1]), 0.7
    loss = loss_and_kl(logits, base, labels, CausalHead(identity), nullcontext, beta, 2)
    (found,) = torch.autograd.grad(loss, logits)
    onehot = nn.functional.one_hot(labels, 7)
    expected = (1 + beta) * logits.softmax(-1) - onehot - beta * base.softmax(-1)
    torch.testing.assert_close(found, expected.detach())


def test_no_supervised_token_is_a_zero_that_can_go_backward() -> None:
    hidden = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    loss = loss_and_kl(hidden, hidden, torch.zeros(0, dtype=torch.int64), make_head("plain", True), nullcontext, 1.0, 8)
    loss.backward()
    assert loss == 0.0
