"""Every weight has the dtype that was asked for, and 16-bit training stays close to fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.architectures import ARCHITECTURES, tiny_model
from tests.unit.built import loss_of, make_recipe, make_run
from tests.unit.packed import loss_and_gradients, packed_batch
from tunewise.errors import Conflict
from tunewise.methods.attention import Attention, default_attention_kind
from tunewise.methods.freezing import Freeze
from tunewise.methods.lora import LoRA
from tunewise.methods.loss import SupervisedLoss, WholeLoss
from tunewise.methods.method import Run
from tunewise.methods.precision import Precision, check_dtypes, default_compute, dtype_table
from tunewise.recipe import Method

BF16 = Precision(compute="bf16")


def built(architecture: str, precision: Precision, *methods: Method) -> Run:
    model = tiny_model(architecture)
    if methods:
        model.requires_grad_(False)
    return make_run(model, precision, Attention(kind=default_attention_kind(model)), SupervisedLoss(), *methods)


@pytest.mark.parametrize(
    ("precision", "frozen", "trained", "autocast"),
    [
        (Precision(), torch.float32, torch.float32, None),
        (BF16, torch.bfloat16, torch.float32, None),
        (Precision(compute="bf16", trainable="same"), torch.bfloat16, torch.bfloat16, None),
        (Precision(compute="fp16"), torch.float16, torch.float32, None),
    ],
)
def test_lora_dtypes(precision: Precision, frozen: torch.dtype, trained: torch.dtype, autocast: None) -> None:
    run = built("llama", precision, LoRA(rank=2))
    assert {p.dtype for p in run.model.parameters() if not p.requires_grad} == {frozen}
    assert {p.dtype for _, p in run.trainable()} == {trained}
    assert run.autocast_dtype is autocast
    assert run.storage_dtype == frozen
    assert run.use_grad_scaler == (precision.compute == "fp16")
    table = check_dtypes(run)
    assert set(table["trainable"]) == {trained}
    assert table["frozen"] == {frozen: sum(p.numel() for p in run.model.parameters() if not p.requires_grad)}
    assert any(str(trained).removeprefix("torch.") in note for note in run.notes)


def test_full_training_is_mixed_or_pure() -> None:
    mixed = built("llama", BF16)
    assert set(dtype_table(mixed.model)["trainable"]) == {torch.float32}
    assert mixed.autocast_dtype == torch.bfloat16
    pure = built("llama", Precision(compute="bf16", trainable="same"))
    assert set(dtype_table(pure.model)["trainable"]) == {torch.bfloat16}
    assert pure.autocast_dtype is None
    assert built("llama", Precision()).autocast_dtype is None


def test_modules_to_save_need_autocast() -> None:
    run = built("llama", BF16, LoRA(rank=2, modules_to_save=("lm_head",)))
    assert run.autocast_dtype == torch.bfloat16
    batch, _ = packed_batch()
    _, gradients = loss_and_gradients(run.model, loss_of(run, batch))
    assert any("lm_head" in name for name in gradients)


def test_loading_dtype_makes_no_rounded_masters() -> None:
    assert BF16.loading_dtype(make_recipe()) == torch.float32
    assert BF16.loading_dtype(make_recipe(LoRA())) == torch.bfloat16
    assert BF16.loading_dtype(make_recipe(Freeze(train=("lm_head",)))) == torch.float32
    assert Precision(compute="bf16", trainable="same").loading_dtype(make_recipe()) == torch.bfloat16


def direction(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the cosine between all gradients together."""
    flat = [torch.cat([g[name].flatten().float() for name in sorted(theirs)]) for g in (ours, theirs)]
    return float(nn.functional.cosine_similarity(flat[0], flat[1], dim=0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("methods", [(), (LoRA(rank=2),)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "precision", [BF16, Precision(compute="bf16", trainable="same"), Precision(compute="fp16")], ids=str
)
def test_gradients_point_the_same_way(architecture: str, methods: tuple[Method, ...], precision: Precision) -> None:
    batch, _ = packed_batch(row_tokens=None)
    expected, ours = (built(architecture, each, *methods) for each in (Precision(), precision))
    for run in (expected, ours):
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(len(name))
                parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    expected_loss, expected_gradients = loss_and_gradients(expected.model, loss_of(expected, batch))
    loss, gradients = loss_and_gradients(ours.model, loss_of(ours, batch))
    assert loss == pytest.approx(expected_loss, rel=0.05)
    assert direction(gradients, expected_gradients) > 0.95


def test_a_dtype_that_changed_is_found() -> None:
    run = built("llama", BF16, LoRA(rank=2))
    name, parameter = next(run.trainable())
    parameter.data = parameter.data.bfloat16()
    with pytest.raises(Conflict, match=f"{name}.*should be float32, but is bfloat16"):
        check_dtypes(run)


def test_conflicts() -> None:
    recipe = make_recipe(device="cpu")
    assert "cannot be unscaled" in str(Precision(compute="fp16", trainable="same").conflict(recipe))
    assert "CUDA" in str(Precision(compute="tf32").conflict(recipe))
    assert BF16.conflict(recipe) is None
    with pytest.raises(Conflict, match="tf32"):
        make_run(tiny_model("llama"), Precision(compute="tf32"))


def test_quantized_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    small = nn.Parameter(torch.zeros(4, dtype=torch.float8_e4m3fn), requires_grad=False)
    model[0].weight, model[0].bias = packed, small
    make_run(model, BF16)
    assert model[0].weight.dtype == torch.uint8
    assert model[0].bias.dtype == torch.float8_e4m3fn


def test_dry_run() -> None:
    with FakeTensorMode():
        model = nn.Linear(4, 4)
        model.weight.requires_grad_(False)
        run = make_run(model, BF16, is_dry=True)
        assert model.weight.dtype == torch.bfloat16
        assert model.bias.dtype == torch.float32
        assert run.autocast_dtype == torch.bfloat16


def test_default_compute() -> None:
    assert default_compute(torch.device("cpu")) in ("bf16", "fp32")
    assert default_compute(torch.device("mps")) == "fp32"


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "IA3"])
@pytest.mark.parametrize("precision", [Precision(), BF16], ids=str)
def test_peft_methods_with_whole_loss(kind: str, precision: Precision) -> None:
    pytest.importorskip("peft")
    from tunewise.methods.peft import Peft

    options = {} if kind == "IA3" else {"num_virtual_tokens": 4}
    model = tiny_model("llama").requires_grad_(False)
    run = make_run(model, Peft(kind=kind, options=options), precision, Attention(kind="sdpa"), WholeLoss())
    check_dtypes(run)
    batch, _ = packed_batch(row_tokens=None)
    loss, gradients = loss_and_gradients(run.model, loss_of(run, batch))
    assert loss > 0
    assert sum(float(g.abs().sum()) for g in gradients.values()) > 0


@pytest.mark.parametrize("pattern", ["*bias", "*ln_*.weight"])
def test_a_norm_that_is_trained_in_part_computes(pattern: str) -> None:
    run = make_run(tiny_model("gpt2"), Freeze(train=(pattern,)), Precision(compute="bf16", trainable="fp32"))
    norm = run.model.get_submodule("transformer.h.0.ln_1")
    assert {parameter.dtype for parameter in norm.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast_dtype is not None):
        run.model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits.float().square().mean().backward()
    assert all(parameter.grad is not None for _, parameter in run.trainable())
