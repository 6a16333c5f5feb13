"""Padded sizes: loss and gradients of real entries as without, zeros that stay zeros, and models saved in their own
size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from tests.laws.test_same_gradients import CONFIG, assert_same, corpus, loss_and_gradients
from tests.unit.architectures import tiny_model
from tests.unit.built import make_recipe
from tests.unit.built import make_run as bare_run
from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise import api
from tunewise.engine.build import build
from tunewise.engine.step import clipped_norm, gradients, parameter_groups, set_learning_rate, update
from tunewise.errors import Conflict
from tunewise.methods import (
    AdamW,
    Freeze,
    Lion,
    LoRA,
    Packing,
    Pad,
    Peft,
    Precision,
    Quantize,
    SupervisedLoss,
    WholeLoss,
    complete,
)
from tunewise.methods.method import Run
from tunewise.recipe import BatchSpec, Method
from tunewise.workload.model import random_model

CPU = torch.device("cpu")


def made(*methods: Method, is_tied: bool = False) -> Run:
    config = LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": is_tied})
    recipe = make_recipe(Precision(compute="fp32"), *methods).replace(batch=BatchSpec(documents=7, micro_batch_size=4))
    run = build(complete(recipe, config, CPU), random_model(config, torch.float32, seed=0), CPU)
    with torch.no_grad():
        for name, parameter in run.trainable():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(1)
                first = parameter[:, :6]
                first.copy_(0.05 * torch.randn(first.shape, generator=generator))
    return run


@pytest.mark.parametrize("loss", [WholeLoss(), SupervisedLoss(), SupervisedLoss(chunk_tokens=5)], ids=str)
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("adapter", [(), (LoRA(rank=6),)], ids=["full", "lora"])
def test_loss_and_gradients_of_real_entries(loss: Method, is_tied: bool, adapter: tuple[Method, ...]) -> None:
    """A vocabulary of 97 becomes 128, a rank of 6 becomes 8."""
    plain = loss_and_gradients(made(loss, *adapter, is_tied=is_tied))
    padded_loss, padded = loss_and_gradients(made(loss, *adapter, Pad(), is_tied=is_tied))
    real = {}
    for name, gradient in padded.items():
        rows, columns = (*plain[1][name].shape, 0)[:2]
        kept = gradient[:rows, :columns] if gradient.ndim == 2 else gradient
        if gradient.ndim == 2:
            assert not bool(gradient[rows:].any())
            assert not bool(gradient[:, columns:].any())
        real[name] = kept
    changed = [name for name in padded if padded[name].shape != plain[1][name].shape]
    assert changed
    assert_same((padded_loss, real), plain, 1e-5)


def test_padded_rows() -> None:
    plain, padded = made(), made(Pad(vocabulary=None, rank=None, length=32))
    rows = padded.layout.micro_batches(range(7), corpus().lengths)
    widths = [padded.layout.build(part, corpus()).input_ids_RL.shape[1] for part in rows]
    assert max(widths) == 64
    assert all(width % 32 == 0 for width in widths)
    assert_same(loss_and_gradients(padded), loss_and_gradients(plain), 1e-5)


@pytest.mark.parametrize("optimizer", [AdamW(), Lion()], ids=lambda method: method.name)
def test_zeros_stay_zeros_and_the_model_gets_its_size_back(optimizer: Method) -> None:
    ends = []
    for pad in ((), (Pad(),)):
        run = made(optimizer, *pad, is_tied=True)
        built, scaler = run.make_optimizer(parameter_groups(run)), torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(3):
            set_learning_rate(built, 1e-3)
            rows = run.layout.micro_batches(range(7), corpus().lengths)
            batches = [run.layout.build(part, corpus()) for part in rows]
            gradients(run, batches, int(corpus().num_supervised.sum()), scaler)
            clipped_norm(run, built, scaler)
            update(run, built, scaler)
        if run.undo_padding is not None:
            assert run.model.get_output_embeddings().weight.shape == (128, 64)  # type: ignore[operator]
            assert not bool(run.model.get_output_embeddings().weight[97:].any())  # type: ignore[operator]
            run.undo_padding()
        ends.append(run.model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-4 if optimizer.name == "adamw" else 5e-3)


@pytest.mark.parametrize("methods", [{"lora": {"rank": 6}}, {}], ids=["lora", "full"])
def test_a_whole_run_saves_what_loads(methods: dict[str, Any], tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", vocab_size=4100)
    recipe = recipe_over(
        model,
        write_records(tmp_path / "r.jsonl", 30),
        training={"steps": 2},
        methods={**methods, "pad": {}, "precision": {"compute": "fp32"}, "attention": {"kind": "eager"}},
    )
    result = api.train(recipe, out=tmp_path / "run")
    assert result.saved.max_difference == 0.0
    if methods:
        tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
        assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {8}
        api.export_merged(tmp_path / "run", tmp_path / "merged")
    else:
        tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
        assert tensors["model.embed_tokens.weight"].shape[0] == 4100


def test_it_says_when_there_is_nothing_to_do() -> None:
    run = made(Pad(vocabulary=97, rank=2), LoRA(rank=4))
    assert "nothing to pad" in run.notes[-2] + run.notes[-1]
    assert run.undo_padding is None


def test_conflicts() -> None:
    assert "pad_to" in str(Pad(length=8).conflict(make_recipe(Packing(), Pad(length=8))))
    assert Pad().conflict(make_recipe(Packing(), Pad())) is None
    assert "peft" in str(Pad().conflict(make_recipe(Peft(kind="IA3"), Pad())))
    with pytest.raises(Conflict, match="beside an adapter"):
        made(LoRA(rank=4), Freeze(train=("lm_head*",)), Pad())
    with pytest.raises(Conflict, match="plain linear"):
        made(LoRA(rank=4), Quantize(kind="int8", skip_modules=()), Pad())
    with pytest.raises(Conflict, match="caps"):
        bare_run(tiny_model("gemma2"), Pad())
