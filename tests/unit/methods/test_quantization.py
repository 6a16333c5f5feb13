"""Quantized models: which layers are packed, that the model then computes with just these numbers, QLoRA,
refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.architectures import ARCHITECTURES, tiny_model
from tests.unit.methods.adapted import disturb, logits, make_recipe, make_run, token_ids
from tests.unit.tiny_runs import save_model
from tunewise.errors import Conflict, InputError
from tunewise.layers.fp8_linear import Fp8ProductLinear
from tunewise.layers.int8_linear import Int8ProductLinear
from tunewise.layers.linear import PackedLinear, output_head
from tunewise.layers.lora import lora_layers, merge_lora
from tunewise.layers.quantized import Fp8Linear, Int8Linear, QuantKind
from tunewise.methods.freezing import Freeze
from tunewise.methods.lora import LoRA
from tunewise.methods.quantization import Quantize
from tunewise.recipe import ModelSpec
from tunewise.workload.model import load_config, load_model

pytest.importorskip("bitsandbytes")
KINDS: tuple[QuantKind, ...] = ("nf4", "fp4", "int8", "fp8")


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_computes_with_the_dequantized_weights(architecture: str, kind: QuantKind) -> None:
    run = make_run(tiny_model(architecture), Quantize(kind=kind))
    packed = packed_layers(run.model)
    assert packed
    assert output_head(run.model) not in packed.values()
    quantized = logits(run.model)
    for name, layer in packed.items():
        run.model.set_submodule(name, layer.to_dense(torch.float32))
    assert torch.allclose(logits(run.model), quantized, rtol=1e-5, atol=1e-5)


def test_int8_stays_near_the_original() -> None:
    model = tiny_model("llama")
    before = logits(model)
    after = logits(make_run(model, Quantize(kind="int8")).model)
    assert 0 < float((after - before).norm() / before.norm()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_qlora_trains_the_update_and_merges_into_the_dequantized_weights(architecture: str, kind: QuantKind) -> None:
    run = make_run(tiny_model(architecture), Quantize(kind=kind), LoRA(rank=4))
    assert all(isinstance(layer.base_layer, PackedLinear) for layer in lora_layers(run.model).values())
    base = logits(run.model)
    disturb(run.model)
    run.model.train()(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
    assert all(parameter.grad is not None for _, parameter in run.trainable())
    trained = logits(run.model)
    assert not torch.allclose(trained, base)
    merge_lora(run.model)
    assert not packed_layers(run.model)
    assert torch.allclose(logits(run.model), trained, rtol=1e-5, atol=1e-4)


def test_skips_and_says_so() -> None:
    run = make_run(tiny_model("llama"), Quantize(kind="int8", skip_modules=("lm_head", "q_proj", "layers.1")))
    names = packed_layers(run.model)
    assert all(name.startswith("model.layers.0") and "q_proj" not in name for name in names)
    assert len(names) == 6
    assert run.notes[0].startswith("int8 weights in 6 linear layers: ")


def test_the_head_is_packed_on_request_unless_it_is_tied() -> None:
    run = make_run(tiny_model("llama", tie_word_embeddings=False), Quantize(kind="int8", skip_modules=()))
    assert output_head(run.model) in packed_layers(run.model).values()
    with pytest.raises(Conflict, match="shares its tensor"):
        make_run(tiny_model("llama", tie_word_embeddings=True), Quantize(kind="int8", skip_modules=()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    ("kind", "layer_type", "words", "nearness"),
    [("int8", Int8ProductLinear, "multiplied in 8 bits", 0.03), ("fp8", Fp8ProductLinear, "multiplied in FP8", 0.1)],
)
def test_narrow_products_stay_near_those_with_the_unpacked_weight(
    architecture: str, kind: Literal["int8", "fp8"], layer_type: type, words: str, nearness: float
) -> None:
    model = tiny_model(architecture)
    unpacked = logits(make_run(copy.deepcopy(model), Quantize(kind=kind)).model)
    run = make_run(model, Quantize(kind=kind, compute=kind), LoRA(rank=4))
    assert all(isinstance(layer.base_layer, layer_type) for layer in lora_layers(run.model).values())
    assert words in run.notes[0]
    found = logits(run.model)
    assert 0 < float((found - unpacked).norm() / unpacked.norm()) < nearness
    disturb(run.model)
    run.model.train()(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
    assert all(parameter.grad is not None for _, parameter in run.trainable())


@pytest.mark.parametrize(("kind", "layer_type"), [("int8", Int8Linear), ("fp8", Fp8Linear)])
def test_a_head_is_never_multiplied_in_8_bits(kind: Literal["int8", "fp8"], layer_type: type) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    run = make_run(model, Quantize(kind=kind, compute=kind, skip_modules=()))
    assert type(output_head(run.model)) is layer_type


def test_products_in_8_bits_need_a_weight_in_8_bits() -> None:
    with pytest.raises(ValidationError, match="use kind: int8"):
        Quantize(kind="nf4", compute="int8")
    with pytest.raises(ValidationError, match="use kind: fp8"):
        Quantize(kind="int8", compute="fp8")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what the process maps")
def test_a_packed_model_lets_its_file_go(tmp_path: Path) -> None:
    """Weights are read as parts of a file that is mapped as a whole, and packed ones would stay in memory with it."""
    folder = save_model(tmp_path / "model")
    spec = ModelSpec(name=str(folder))
    model = load_model(spec, load_config(spec), torch.float32, seed=0)
    file = str((folder / "model.safetensors").resolve())
    assert file in Path("/proc/self/maps").read_text()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = make_run(model, Quantize(kind="int8"), LoRA(rank=4))
    del model
    assert file not in Path("/proc/self/maps").read_text()
    kept = {name: parameter for name, parameter in run.model.named_parameters() if name in before}
    assert kept
    assert all(torch.equal(parameter, before[name]) for name, parameter in kept.items())


def test_says_that_experts_keep_their_precision() -> None:
    run = make_run(tiny_model("mixtral"), Quantize(kind="int8"))
    assert "experts" in run.notes[1]


def test_clear_errors() -> None:
    with pytest.raises(InputError, match=r"quantize.skip_modules: there is no 'q_porj'.*'q_proj'"):
        make_run(tiny_model("llama"), Quantize(skip_modules=("q_porj",)))
    with pytest.raises(ValidationError, match="belong to nf4"):
        Quantize(kind="int8", double_quant=True)
    recipe = make_recipe(Quantize())
    assert "add 'lora'" in str(Quantize().conflict(recipe))
    assert Quantize().conflict(make_recipe(Quantize(), LoRA())) is None
    with pytest.raises(Conflict, match="whose weight is quantized"):
        make_run(
            tiny_model("llama", tie_word_embeddings=False),
            Quantize(kind="int8", skip_modules=()),
            LoRA(modules_to_save=("lm_head",)),
        )


def test_biases_can_be_trained_beside_packed_weights() -> None:
    run = make_run(tiny_model("opt"), Quantize(kind="nf4"), Freeze(train=("*.bias",)))
    run.model(input_ids=token_ids()).logits.square().mean().backward()
    trained = dict(run.trainable())
    assert "model.decoder.layers.0.fc1.bias" in trained
    assert all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.parametrize("kind", KINDS)
def test_builds_on_fake_tensors_with_the_same_bytes(kind: QuantKind) -> None:
    real = make_run(tiny_model("llama"), Quantize(kind=kind), LoRA(rank=4)).model
    with FakeTensorMode():
        run = make_run(tiny_model("llama"), Quantize(kind=kind), LoRA(rank=4), is_dry=True)
        run.model(input_ids=torch.ones(2, 7, dtype=torch.int64), use_cache=False).logits.sum().backward()
    for (name, fake), (real_name, tensor) in zip(
        run.model.state_dict().items(), real.state_dict().items(), strict=True
    ):
        assert (name, fake.shape, fake.dtype) == (real_name, tensor.shape, tensor.dtype)
    assert all(parameter.grad is not None for _, parameter in run.trainable())
