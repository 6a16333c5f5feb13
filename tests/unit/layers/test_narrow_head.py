"""Cross entropy with products in 8 bits: the kernel against its twin, both against the exact loss and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tunewise.layers import native
from tunewise.layers.head import CausalHead
from tunewise.layers.loss import supervised_loss
from tunewise.layers.narrow_head import NarrowHead, round_gradient_

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler for the kernels")
KERNEL_OR_TWIN = pytest.mark.parametrize("uses_kernel", [False, pytest.param(True, marks=needs_compiler)])


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("vocab", [2, 97, 4100])
def test_the_kernel_against_its_twin(dtype: torch.dtype, scale: float, vocab: int) -> None:
    """Exponentials differ in their last digits, so a number on the edge of two steps may fall to either side."""
    logits, labels = drawn(9, vocab, scale=6.0).to(dtype), torch.arange(9) % vocab
    col_scale = drawn(vocab, seed=1).abs() + 0.1
    found = [round_gradient_(logits.clone(), labels, col_scale, scale, uses_kernel) for uses_kernel in (True, False)]
    (rows, row_scale, label_grad, loss), (twin_rows, *twin) = found
    torch.testing.assert_close([row_scale, label_grad, loss], twin, rtol=1e-5, atol=1e-6)
    assert rows.dtype == twin_rows.dtype == torch.uint8
    assert rows.stride(1) == 1
    apart = (rows.int() - twin_rows.int()).abs()
    assert int(apart.max()) <= 1
    assert float(apart.float().mean()) < 1e-3
    assert (rows.gather(1, labels[:, None]) == 0).all()
    assert int(rows.max()) == 255


@KERNEL_OR_TWIN
def test_the_gradient_is_right_on_average_however_small_its_parts(uses_kernel: bool) -> None:
    """A tail of which every part is a twentieth of a step: to nearest all of it would vanish."""
    tokens, vocab = 2048, 600
    logits = drawn(1, vocab, scale=0.1).repeat(tokens, 1)
    logits[:, 5] += math.log(5100)  # the row's largest: 255 steps, the others about a twentieth of one
    col_scale = torch.ones(vocab)
    labels = torch.full((tokens,), 7)
    exact = logits.double().softmax(1)[0]
    exact[7] = 0.0
    rows, row_scale, _, _ = round_gradient_(logits, labels, col_scale, 1.0, uses_kernel)
    found = (rows.double() * row_scale.double()[:, None]).mean(0)
    step = float(row_scale[0])
    assert 0.03 < float(exact[10]) / step < 0.07
    deviation = (exact / step * (1 - exact / step).clamp_min(0)).sqrt() * step / math.sqrt(tokens)
    assert ((found - exact).abs() <= 5 * deviation + 1e-6 * exact).all()
    tail = exact.sum() - exact[5]
    sums = rows.double().sum(1) - rows[:, 5].double()
    assert float((sums * step / tail - 1).abs().max()) < 0.2, "the sequence fills the interval evenly within a row"


@KERNEL_OR_TWIN
def test_what_padding_adds_has_no_gradient_at_all(uses_kernel: bool) -> None:
    logits = drawn(3, 40)
    logits[:, 33:] = float("-inf")
    logits[:, 32] = -1e4
    rows, *_ = round_gradient_(logits, torch.tensor([1, 2, 3]), torch.ones(40), 1.0, uses_kernel)
    assert not rows[:, 32:].any()


@KERNEL_OR_TWIN
def test_what_is_not_a_number_stays_visible(uses_kernel: bool) -> None:
    logits = drawn(2, 40)
    logits[0, 3] = math.nan
    _, row_scale, label_grad, loss = round_gradient_(logits, torch.tensor([1, 1]), torch.ones(40), 1.0, uses_kernel)
    for found in (row_scale, label_grad, loss):
        assert found[0].isnan()
        assert found[1].isfinite()


@KERNEL_OR_TWIN
def test_a_certain_label_leaves_a_gradient_of_zero(uses_kernel: bool) -> None:
    logits = torch.full((1, 30), float("-inf"))
    logits[0, 4] = 3.0
    rows, row_scale, label_grad, loss = round_gradient_(logits, torch.tensor([4]), torch.ones(30), 1.0, uses_kernel)
    assert not rows.any()
    assert float(row_scale) == float(label_grad) == float(loss) == 0.0


def frozen_head(scale: float = 1.0, bias: bool = False) -> CausalHead:
    torch.manual_seed(0)
    return CausalHead(nn.Linear(96, 700, bias=bias).requires_grad_(False), scale)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_head_is_the_same_head(dtype: torch.dtype) -> None:
    head, labels = frozen_head(), torch.arange(300)[None]
    head.output.to(dtype)
    assert isinstance(head.output, nn.Linear)
    found = []
    for packs in (False, True):
        hidden = drawn(1, 300, 96, seed=3).to(dtype).requires_grad_()
        narrow = NarrowHead.of(head.output, packs)
        loss = supervised_loss(hidden, labels, head, 300, 128, True, narrow)
        loss.backward()
        assert hidden.grad is not None
        found.append((loss.detach(), hidden.grad, narrow.stored_bytes))
    (loss, grad, size), (packed_loss, packed_grad, packed_size) = found
    assert torch.equal(loss, packed_loss)
    assert torch.equal(grad, packed_grad)
    assert packed_size == 704 * 96 + 128 * 700 + 4 * 700  # whole panels of 64 outputs
    assert size == 700 * 96 + 4 * 700


@KERNEL_OR_TWIN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, False), (0.5, True)])
def test_the_loss_against_the_exact_one(uses_kernel: bool, dtype: torch.dtype, scale: float, bias: bool) -> None:
    """Many tokens: what is rounded at random weighs less and less, to nearest it would stay."""
    head = frozen_head(scale, bias)
    head.output.to(dtype)
    assert isinstance(head.output, nn.Linear)
    narrow = NarrowHead.of(head.output)
    labels = torch.randint(0, 700, (2, 400), generator=torch.Generator().manual_seed(2))
    labels[:, :30] = -100
    results = []
    for narrowed in (narrow, None):
        hidden = drawn(2, 400, 96, seed=3, scale=4.0).to(dtype).requires_grad_()
        loss = supervised_loss(hidden, labels, head, 740, 128, uses_kernel, narrowed)
        loss.backward()
        assert hidden.grad is not None
        results.append((loss.detach(), hidden.grad.float()))
    (ours, ours_grad), (exact, exact_grad) = results
    assert float((ours - exact).abs() / exact) < 2e-3
    assert 1e-4 < float((ours_grad - exact_grad).norm() / exact_grad.norm()) < 0.02
    mean, exact_mean = ours_grad.sum((0, 1)), exact_grad.sum((0, 1))
    assert float((mean - exact_mean).norm() / exact_mean.norm()) < 0.01


def test_what_is_only_measured_is_measured_exactly() -> None:
    head, hidden = frozen_head(), drawn(1, 9, 96)
    assert isinstance(head.output, nn.Linear)
    labels = torch.arange(9)[None]
    with torch.no_grad():
        found = supervised_loss(hidden, labels, head, 9, narrow=NarrowHead.of(head.output))
        assert torch.equal(found, supervised_loss(hidden, labels, head, 9))


def test_the_copy_is_rounded_by_at_most_half_a_step() -> None:
    output = nn.Linear(40, 5000, bias=False)
    narrow = NarrowHead.of(output)
    assert narrow.weight_VD is not None
    error = (narrow.weight_VD * narrow.scale_V[:, None] - output.weight).abs()
    assert (error <= 0.5001 * narrow.scale_V[:, None]).all()
    assert narrow.stored_bytes == 5000 * 44
