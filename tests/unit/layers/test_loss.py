"""The loss over supervised tokens, in chunks, against torch's cross entropy over everything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.architectures import ARCHITECTURES, tiny_model
from tests.unit.packed import largest_difference, loss_and_gradients, packed_batch
from tunewise.layers.head import CausalHead
from tunewise.layers.loss import supervised_loss, whole_loss

LABELS = torch.tensor([[3, -100, 5, 6, -100], [-100, -100, 0, 1, 2], [6, 6, -100, -100, 4]])
NUM_SUPERVISED = int((LABELS != -100).sum())
HEADS = {"plain": (1.0, None), "scaled": (0.3, None), "softcapped": (1.0, 0.8), "both": (0.7, 1.3)}


def make_head(kind: str, bias: bool, dtype: torch.dtype = torch.float64) -> CausalHead:
    torch.manual_seed(0)
    scale, softcap = HEADS[kind]
    return CausalHead(nn.Linear(4, 7, bias=bias, dtype=dtype), scale, softcap)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_finite_differences(kind: str, bias: bool) -> None:
    """torch's gradcheck goes backward twice through one graph, which this loss refuses."""
    head = make_head(kind, bias)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    inputs = [hidden, *head.output.parameters()]

    def loss() -> Tensor:
        return supervised_loss(hidden, LABELS, head, NUM_SUPERVISED, chunk_tokens=4)

    for tensor, gradient in zip(inputs, torch.autograd.grad(loss(), inputs), strict=True):
        numbers, step = tensor.data.view(-1), 1e-5
        for place in range(numbers.numel()):
            present = numbers[place].item()
            ends = []
            for value in (present + step, present - step):
                numbers[place] = value
                ends.append(loss().item())
            numbers[place] = present
            assert gradient.flatten()[place].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_equals_the_whole_loss(kind: str, is_trained: bool, chunk_tokens: int) -> None:
    head = make_head(kind, bias=True, dtype=torch.float32)
    head.output.requires_grad_(is_trained)
    hidden = torch.randn(3, 5, 4, requires_grad=True)
    inputs = [hidden, *(p for p in head.output.parameters() if is_trained)]
    losses = [
        whole_loss(head.logits(hidden), LABELS),
        supervised_loss(hidden, LABELS, head, NUM_SUPERVISED, chunk_tokens),
    ]
    expected, ours = (torch.autograd.grad(3 * loss, inputs) for loss in losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for our_gradient, their_gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        alone = supervised_loss(hidden, LABELS, head, NUM_SUPERVISED, chunk_tokens)
    torch.testing.assert_close(alone, losses[0].detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("trained", ["all", "decoder", "head"])
def test_every_architecture(architecture: str, trained: str) -> None:
    model = tiny_model(architecture)
    batch, _ = packed_batch(row_tokens=None)
    head = CausalHead.of(model)
    weight = head.output.weight
    for parameter in model.parameters():
        parameter.requires_grad_(trained == "all" or (parameter is weight) == (trained == "head"))

    def whole() -> Tensor:
        logits = model(input_ids=batch.input_ids_RL, position_ids=batch.position_ids_RL, use_cache=False).logits
        return whole_loss(logits, batch.labels_RL)

    def supervised() -> Tensor:
        hidden = head.hidden(model, batch.input_ids_RL, batch.position_ids_RL)
        return supervised_loss(hidden, batch.labels_RL, head, batch.num_supervised, chunk_tokens=16)

    expected_loss, expected = loss_and_gradients(model, whole)
    loss, gradients = loss_and_gradients(model, supervised)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert largest_difference(gradients, expected) < 1e-5


def test_head_with_an_adapter() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.update = nn.Linear(4, 7).requires_grad_(False), nn.Linear(4, 7)

        def forward(self, hidden: Tensor) -> Tensor:
            out: Tensor = self.base(hidden) + self.update(hidden)
            return out

    torch.manual_seed(0)
    module = Adapted()
    head = CausalHead(module, softcap=2.0)
    hidden = torch.randn(3, 5, 4, requires_grad=True)
    inputs = [hidden, *module.update.parameters()]
    losses = [
        whole_loss(head.logits(hidden), LABELS),
        supervised_loss(hidden, LABELS, head, NUM_SUPERVISED, 4),
    ]
    expected, ours = (torch.autograd.grad(loss, inputs) for loss in losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for our_gradient, their_gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_linear", [True, False])
def test_nothing_supervised_is_zero(is_linear: bool) -> None:
    module: nn.Module = nn.Linear(4, 7) if is_linear else nn.Sequential(nn.Linear(4, 7))
    hidden = torch.randn(3, 5, 4, requires_grad=True)
    loss = supervised_loss(hidden, torch.full_like(LABELS, -100), CausalHead(module), 0)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() == 0


def test_bf16_and_autocast_stay_close_to_fp32() -> None:
    torch.manual_seed(0)
    head = CausalHead(nn.Linear(64, 500, bias=False))
    hidden = torch.randn(1, 200, 64, requires_grad=True)
    labels = torch.randint(0, 500, (1, 200))
    inputs = [hidden, head.output.get_parameter("weight")]
    expected = torch.autograd.grad(whole_loss(head.logits(hidden), labels), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = supervised_loss(hidden, labels, head, 200, chunk_tokens=64)
    ours = torch.autograd.grad(loss, inputs)
    assert loss.dtype == torch.float32
    low = CausalHead(nn.Linear(64, 500, bias=False, dtype=torch.bfloat16))
    low.output.load_state_dict(head.output.state_dict())
    low_hidden = hidden.detach().bfloat16().requires_grad_()
    low_loss = supervised_loss(low_hidden, labels, low, 200, chunk_tokens=64)
    low_grads = torch.autograd.grad(low_loss, [low_hidden, low.output.get_parameter("weight")])
    for gradients in (ours, low_grads):
        for ours_one, theirs in zip(gradients, expected, strict=True):
            assert (ours_one.float() - theirs).norm() < 1e-2 * theirs.norm()
    assert [g.dtype for g in ours] == [torch.float32] * 2
    assert [g.dtype for g in low_grads] == [torch.bfloat16] * 2


def test_second_backward_is_refused() -> None:
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    loss = supervised_loss(hidden, LABELS, make_head("plain", bias=False), NUM_SUPERVISED)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already used"):
        loss.backward()


def most_logits_at_once(compute: Callable[[], Tensor]) -> int:
    """Return the most numbers that one tensor of vocabulary width held."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest: int = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            is_weight = isinstance(out, Tensor) and out.shape == (4, 7)
            if isinstance(out, Tensor) and out.ndim == 2 and out.shape[-1] == 7 and not is_weight:
                self.largest = max(self.largest, out.numel())
            return out

    with Watch() as watch:
        compute().backward()
    return int(watch.largest)


def test_never_more_logits_than_a_chunk() -> None:
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    head = make_head("softcapped", bias=False)
    assert most_logits_at_once(lambda: supervised_loss(hidden, LABELS, head, NUM_SUPERVISED, 2)) == 2 * 7
    assert most_logits_at_once(lambda: whole_loss(head.logits(hidden), LABELS)) == 15 * 7


def test_dry_run() -> None:
    with FakeTensorMode():
        head = make_head("both", bias=True, dtype=torch.float32)
        hidden = torch.randn(3, 5, 4, requires_grad=True)
        labels = torch.zeros(3, 5, dtype=torch.long)
        loss = supervised_loss(hidden, labels, head, num_supervised=9, chunk_tokens=4)
        loss.backward()
        assert loss.shape == ()
        assert hidden.grad is not None
        assert hidden.grad.shape == (3, 5, 4)
        assert head.output.weight.grad is not None
