"""LoRA in a model: which layers it takes, what is trained, what it says, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.architectures import ARCHITECTURES, tiny_model
from tests.unit.methods.adapted import disturb, logits, make_recipe, make_run, token_ids
from tunewise.errors import Conflict, InputError
from tunewise.layers.linear import output_head
from tunewise.layers.lora import LoraInit, lora_layers, merge_lora
from tunewise.methods.freezing import Freeze
from tunewise.methods.lora import LoRA
from tunewise.methods.quantization import Quantize

LLAMA_TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def last_names(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name in lora_layers(model)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_only_the_update(architecture: str) -> None:
    model = tiny_model(architecture)
    before = logits(model)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = make_run(model, LoRA(rank=4))
    layers = lora_layers(run.model)
    assert layers
    assert output_head(model) not in layers.values()
    assert torch.equal(logits(run.model), before)
    run.model.train()(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
    trained = dict(run.trainable())
    assert set(trained) == {f"{name}.lora_{factor}.weight" for name in layers for factor in "AB"}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert any(bool(parameter.grad.any()) for parameter in trained.values())  # type: ignore[union-attr]
    torch.optim.SGD(trained.values(), lr=0.1).step()
    for name, tensor in run.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, frozen[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_merged_model_computes_the_same(architecture: str) -> None:
    run = make_run(tiny_model(architecture), LoRA(rank=4, use_rslora=True))
    disturb(run.model)
    trained = logits(run.model)
    merge_lora(run.model)
    assert not lora_layers(run.model)
    assert torch.allclose(logits(run.model), trained, rtol=1e-5, atol=1e-5)


def test_says_what_it_did() -> None:
    run = make_run(tiny_model("llama"), LoRA(rank=8))
    assert sum(8 * (layer.in_features + layer.out_features) for layer in lora_layers(run.model).values()) == 7424
    assert run.notes == ["LoRA r8 (alpha 16) on 14 linear layers: 7.42K trainable parameters"]


def test_says_that_experts_are_left_out() -> None:
    run = make_run(tiny_model("mixtral"), LoRA())
    assert last_names(run.model) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "experts" in run.notes[1]
    assert "model.layers.0.mlp.experts.gate_up_proj" in run.notes[1]


@pytest.mark.parametrize(
    ("lora", "names"),
    [
        (LoRA(), LLAMA_TARGETS),
        (LoRA(target_modules=("q_proj", "v_proj")), {"q_proj", "v_proj"}),
        (LoRA(target_modules=("mlp.up_proj",)), {"up_proj"}),
        (LoRA(target_modules=r".*\.[qk]_proj"), {"q_proj", "k_proj"}),
        (
            LoRA(exclude_modules=("down_proj", "up_proj", "gate_proj")),
            {"q_proj", "k_proj", "v_proj", "o_proj"},
        ),
        (LoRA(target_modules=("q_proj", "lm_head")), {"q_proj", "lm_head"}),
    ],
)
def test_targets(lora: LoRA, names: set[str]) -> None:
    run = make_run(tiny_model("llama", tie_word_embeddings=False), lora)
    assert last_names(run.model) == names


def test_chosen_layers_only() -> None:
    run = make_run(tiny_model("llama"), LoRA(target_modules=("q_proj",), layers_to_transform=(1,)))
    assert list(lora_layers(run.model)) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRA(target_modules=("q_porj",)), r"no 'q_porj' in this model. Did you mean 'q_proj'\?"),
        (LoRA(target_modules=("self_attn.qproj",)), r"Did you mean 'self_attn.q_proj'\?"),
        (LoRA(target_modules=".*[qk_proj"), "is not a regular expression"),
        (LoRA(target_modules="q_proj"), "matches no name"),
        (LoRA(target_modules=("embed_tokens",)), "is no linear layer but Embedding"),
        (LoRA(exclude_modules=("nothing",)), "lora.exclude_modules: there is no 'nothing'"),
        (LoRA(layers_to_transform=(7,)), "there is no layer 7"),
        (LoRA(modules_to_save=("head",)), "lora.modules_to_save: there is no 'head'"),
        (LoRA(modules_to_save=("rotary_emb",)), "has no parameters"),
        (LoRA(target_modules=("lm_head",), modules_to_save=("lm_head",)), "leave no layer"),
        (LoRA(rank=40, init="pissa"), "needs a rank of at most"),
    ],
)
def test_clear_errors(lora: LoRA, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_run(tiny_model("llama"), lora)


def test_scale_and_alpha() -> None:
    assert LoRA(rank=8).effective_alpha == 16
    assert LoRA(rank=8, alpha=4).scale == 0.5
    assert LoRA(rank=16, alpha=8, use_rslora=True).scale == 2.0
    run = make_run(tiny_model("llama"), LoRA(rank=4, alpha=2, use_rslora=True))
    assert {layer.scale for layer in lora_layers(run.model).values()} == {2 / math.sqrt(4)}


def test_lora_plus_learns_b_faster() -> None:
    run = make_run(tiny_model("llama"), LoRA(lora_plus_ratio=16.0))
    assert set(run.learning_rate_factors.values()) == {16.0}
    assert set(run.learning_rate_factors) == {name for name, _ in run.trainable() if "lora_B" in name}


def factors(seed: int, lora: LoRA) -> dict[str, Tensor]:
    run = make_run(tiny_model("llama"), lora, seed=seed)
    return {name: parameter.detach() for name, parameter in run.trainable()}


def test_factors_depend_on_seed_and_name_only() -> None:
    first, second, other = (
        factors(1, LoRA()),
        factors(1, LoRA(target_modules=("v_proj",))),
        factors(2, LoRA()),
    )
    name = "model.layers.1.self_attn.v_proj.lora_A.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("layers.1", "layers.0")])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_modules_to_save_are_trained_and_a_tied_head_with_them(architecture: str) -> None:
    embedding = {"llama": "embed_tokens", "gpt2": "wte"}[architecture]
    model = tiny_model(architecture, tie_word_embeddings=True)
    run = make_run(model, LoRA(modules_to_save=(embedding,)))
    full = [name for name, _ in run.trainable() if "lora_" not in name]
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in full] == [embedding]
    assert run.model.lm_head.weight is run.model.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    assert "both learn" in run.notes[1]


def test_a_tied_head_is_no_target() -> None:
    with pytest.raises(Conflict, match="could not be merged"):
        make_run(tiny_model("llama", tie_word_embeddings=True), LoRA(target_modules=("lm_head",)))


def test_goes_with_freeze_but_not_on_the_same_weight() -> None:
    run = make_run(tiny_model("opt"), LoRA(target_modules=("q_proj",)), Freeze(train=("*.bias", "*norm*")))
    names = [name for name, _ in run.trainable()]
    assert "model.decoder.layers.0.self_attn.q_proj.base_layer.bias" in names
    assert "model.decoder.layers.0.self_attn_layer_norm.weight" in names
    run.model(input_ids=token_ids()).logits.sum().backward()
    assert all(parameter.grad is not None for _, parameter in run.trainable())
    with pytest.raises(Conflict, match="trained fully"):
        make_run(tiny_model("opt"), LoRA(target_modules=("q_proj",)), Freeze(train=("*q_proj.weight",)))


def test_freeze_alone_and_its_errors() -> None:
    run = make_run(tiny_model("llama", tie_word_embeddings=True), Freeze(train=("*norm*", "lm_head.weight")))
    kinds = {name for name, _ in run.trainable() if "norm" not in name}
    assert kinds == {"model.embed_tokens.weight"}
    with pytest.raises(InputError, match=r"Did you mean 'model.layers.\*.mlp.up_proj.weight'"):
        make_run(tiny_model("llama"), Freeze(train=("model.layers.*.mlp.uproj.weight",)))
    with pytest.raises(Conflict, match="quantized"):
        make_run(tiny_model("llama"), Freeze(train=("*.weight",)), Quantize(kind="int8"))


def test_pissa_keeps_the_function_and_refuses_quantized_weights() -> None:
    model = tiny_model("gpt2")
    before = logits(model)
    run = make_run(model, LoRA(rank=4, init="pissa"))
    assert torch.allclose(logits(run.model), before, atol=1e-4)
    recipe = make_recipe(LoRA(init="pissa"), Quantize())
    assert "pissa" in str(recipe.methods[1].conflict(recipe))  # type: ignore[index]


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa"])
def test_builds_on_fake_tensors(init: LoraInit) -> None:
    with FakeTensorMode():
        run = make_run(tiny_model("llama"), LoRA(rank=4, init=init), is_dry=True)
        output = run.model(input_ids=torch.ones(2, 7, dtype=torch.int64), use_cache=False)
        output.logits.sum().backward()
    assert all(parameter.grad is not None for _, parameter in run.trainable())


def test_recipe_round_trip() -> None:
    lora = LoRA(rank=3, target_modules=("q_proj",), layers_to_transform=(0,), modules_to_save=("lm_head",))
    assert LoRA(**lora.model_dump(mode="json")) == lora
