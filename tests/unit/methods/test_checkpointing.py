"""Checkpointing gives bit-equal gradients, with dropout too, and keeps less."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy

from tests.unit.architectures import ARCHITECTURES, tiny_model
from tests.unit.built import loss_of, make_run
from tests.unit.packed import loss_and_gradients, packed_batch
from tunewise.errors import Conflict
from tunewise.methods.attention import Attention, AttentionKind, default_attention_kind
from tunewise.methods.checkpointing import Checkpointing, _keep_products
from tunewise.methods.loss import WholeLoss
from tunewise.methods.method import Run
from tunewise.recipe import Method

Policy = Literal["full", "selective"]
DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.2},
    "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "opt": {"dropout": 0.2, "attention_dropout": 0.2},
    "gpt_neox": {"attention_dropout": 0.2, "hidden_dropout": 0.2},
}


def built(
    architecture: str,
    *methods: Method,
    packed: bool = True,
    kind: AttentionKind | None = None,
    **changes: Any,
) -> tuple[Run, Any]:
    model = tiny_model(architecture, **changes).train()
    run = make_run(model, Attention(kind=kind or default_attention_kind(model)), WholeLoss(), *methods)
    return run, packed_batch(28 if packed else None)[0]


def seeded(run: Run, batch: Any) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(7)
    return loss_and_gradients(run.model, loss_of(run, batch))


def assert_bit_equal(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    assert not [name for name in ours[1] if not torch.equal(ours[1][name], theirs[1][name])]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_bit_equal_gradients(architecture: str, policy: Policy) -> None:
    expected = seeded(*built(architecture))
    assert_bit_equal(seeded(*built(architecture, Checkpointing(policy=policy))), expected)


@pytest.mark.parametrize("architecture", DROPOUT)
@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("kind", ["per_document", "sdpa", "eager"])
def test_bit_equal_with_dropout(architecture: str, policy: Policy, kind: AttentionKind) -> None:
    changes = DROPOUT[architecture]
    plain, batch = built(architecture, kind=kind, **changes)
    expected = seeded(plain, batch)
    torch.manual_seed(8)
    assert loss_of(plain, batch)().item() != expected[0]
    assert_bit_equal(seeded(*built(architecture, Checkpointing(policy=policy), kind=kind, **changes)), expected)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_frozen_embeddings(policy: Policy) -> None:
    """With adapters no input of the first block requires a gradient."""
    results = []
    for methods in ((), (Checkpointing(policy=policy),)):
        run, batch = built("llama", *methods)
        run.model.requires_grad_(False)
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
        results.append(seeded(run, batch))
    assert len(results[0][1]) == 2
    assert_bit_equal(results[1], results[0])


def test_every_nth_block() -> None:
    run, _ = built("llama", Checkpointing(every=2), num_hidden_layers=5)
    flags = [layer.gradient_checkpointing for layer in run.model.get_submodule("model.layers").children()]
    assert flags == [True, False, True, False, True]
    assert run.notes == ["checkpointing: full, 3 of 5 blocks"]


def saved_bytes(run: Run, batch: Any) -> int:
    """Return the bytes of all storages that autograd keeps between forward and backward."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(run, batch)()
    return sum(storages.values())


def test_it_keeps_less() -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 6}
    everything = saved_bytes(*built("llama", **sizes))
    half = saved_bytes(*built("llama", Checkpointing(every=2), **sizes))
    full = saved_bytes(*built("llama", Checkpointing(), **sizes))
    assert full < 0.4 * everything
    assert full < half < everything


def test_selective_keeps_products_but_no_attention_that_draws() -> None:
    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    part = torch.zeros(1)
    assert _keep_products(None, aten.mm.default, part, part) == CheckpointPolicy.MUST_SAVE
    assert _keep_products(None, attention, part, part, part, 0.0, True) == CheckpointPolicy.MUST_SAVE
    assert _keep_products(None, attention, part, part, part, 0.1, True) == CheckpointPolicy.PREFER_RECOMPUTE
    assert _keep_products(None, aten.silu.default, part) == CheckpointPolicy.PREFER_RECOMPUTE


def test_a_model_without_blocks() -> None:
    with pytest.raises(Conflict, match="no blocks"):
        make_run(nn.Linear(2, 2), Checkpointing())
