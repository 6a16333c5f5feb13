"""Adapter files: what we write computes the same in peft, what peft writes computes the same here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.unit.architectures import ARCHITECTURES, tiny_model
from tests.unit.methods.adapted import disturb, logits, make_run
from tunewise.errors import InputError, StorageError
from tunewise.export.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from tunewise.layers.lora import lora_layers
from tunewise.methods.freezing import Freeze
from tunewise.methods.lora import LoRA
from tunewise.methods.quantization import Quantize

peft = pytest.importorskip("peft")

VARIANTS = {
    "plain": LoRA(rank=4),
    "rslora": LoRA(rank=4, alpha=3, use_rslora=True),
    "dropout": LoRA(rank=4, dropout=0.3),
    "two targets": LoRA(rank=2, target_modules=("q_proj", "v_proj")),
    "one layer": LoRA(rank=2, target_modules=("q_proj",), layers_to_transform=(1,)),
    "head": LoRA(rank=2, target_modules=("q_proj", "lm_head")),
    "pissa": LoRA(rank=4, init="pissa"),
    "pissa rslora": LoRA(rank=4, init="pissa", use_rslora=True),
    "embedding": LoRA(rank=2, modules_to_save=("embed_tokens", "lm_head")),
    "norm": LoRA(rank=2, modules_to_save=("norm", "input_layernorm")),
}


def trained(model: PreTrainedModel, lora: LoRA, *others: Any) -> nn.Module:
    run = make_run(model, lora, *others)
    disturb(run.model)
    return run.model


def in_peft(model: PreTrainedModel, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        return logits(peft.PeftModel.from_pretrained(model, str(folder)))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5), float((ours - theirs).abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_in_peft_with_the_same_logits(architecture: str, tmp_path: Path) -> None:
    lora = LoRA(rank=4)
    model = trained(tiny_model(architecture), lora)
    save_adapter(model, lora, tmp_path, "the-base")
    assert_close(in_peft(tiny_model(architecture), tmp_path), logits(model))
    base = tiny_model(architecture)
    load_adapter(base, tmp_path)
    assert torch.equal(logits(base), logits(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads_in_peft_and_here(variant: str, tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        return tiny_model("llama", tie_word_embeddings=False)

    lora = VARIANTS[variant]
    model = trained(base(), lora)
    save_adapter(model, lora, tmp_path, "the-base")
    expected = logits(model)
    assert not torch.allclose(expected, logits(base()), rtol=1e-3, atol=1e-3)
    assert_close(in_peft(base(), tmp_path), expected)
    ours = base()
    read = load_adapter(ours, tmp_path)
    assert_close(logits(ours), expected)
    assert read.use_rslora == lora.use_rslora
    assert read.rank == (2 * lora.rank if lora.init == "pissa" else lora.rank)
    assert read.scale == pytest.approx(lora.scale)
    assert not any(parameter.requires_grad for name, parameter in ours.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_tied_embedding_that_was_trained_stays_tied(architecture: str, tmp_path: Path) -> None:
    lora = LoRA(rank=2, modules_to_save=("wte" if architecture == "gpt2" else "embed_tokens",))
    model = trained(tiny_model(architecture, tie_word_embeddings=True), lora)
    save_adapter(model, lora, tmp_path, "the-base")
    expected = logits(model)
    assert_close(in_peft(tiny_model(architecture, tie_word_embeddings=True), tmp_path), expected)
    ours = tiny_model(architecture, tie_word_embeddings=True)
    load_adapter(ours, tmp_path)
    assert_close(logits(ours), expected)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


def test_what_freeze_trains_is_in_the_adapter(tmp_path: Path) -> None:
    lora = LoRA(rank=2, target_modules=("q_proj", "fc1"))
    model = trained(tiny_model("opt"), lora, Freeze(train=("*.bias", "*final_layer_norm.weight")))
    save_adapter(model, lora, tmp_path, "the-base")
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] == "all"
    assert_close(in_peft(tiny_model("opt"), tmp_path), logits(model))
    ours = tiny_model("opt")
    load_adapter(ours, tmp_path)
    assert_close(logits(ours), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_of_a_quantized_model_loads_on_the_dense_one(architecture: str, tmp_path: Path) -> None:
    lora = LoRA(rank=2)
    model = trained(tiny_model(architecture), lora, Quantize(kind="int8"))
    save_adapter(model, lora, tmp_path, "the-base")
    dense = trained(tiny_model(architecture), lora)
    assert_close(in_peft(tiny_model(architecture), tmp_path), logits(dense))
    ours = make_run(tiny_model(architecture), Quantize(kind="int8")).model
    load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), logits(model))


PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 3, "layers.0.self_attn.q_proj": 7},
        "alpha_pattern": {"up_proj": 11},
    },
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
    "pissa": {"init_lora_weights": "pissa"},
    "bias": {"target_modules": ["q_proj"], "bias": "all"},
}


@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_reads_what_peft_wrote(options: str, tmp_path: Path) -> None:
    architecture = "qwen2" if options == "bias" else "llama"

    def base() -> PreTrainedModel:
        return tiny_model(architecture, tie_word_embeddings=False)

    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **PEFT_OPTIONS[options]))
    disturb(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = logits(theirs)
    ours = base().requires_grad_(False)
    lora = load_adapter(ours, tmp_path / "theirs")
    assert_close(logits(ours), expected)
    if options not in ("saved", "bias"):  # what is read is frozen, and only the factors are written again
        save_adapter(ours, lora, tmp_path / "again", "the-base")
        assert_close(in_peft(base(), tmp_path / "again"), expected)


def test_files_are_as_peft_writes_them(tmp_path: Path) -> None:
    lora = LoRA(rank=4)
    save_adapter(trained(tiny_model("gpt2"), lora), lora, tmp_path, "the-base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "the-base"
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 8, True)
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    theirs = peft.get_peft_model(
        tiny_model("gpt2"), peft.LoraConfig(r=4, target_modules=config["target_modules"], fan_in_fan_out=True)
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, reference = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in reference.items()
    }
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert set(config) <= set(json.loads((tmp_path / "theirs" / CONFIG).read_text()))


def test_reads_into_a_run_that_was_built(tmp_path: Path) -> None:
    lora = LoRA(rank=4)
    model = trained(tiny_model("llama"), lora)
    save_adapter(model, lora, tmp_path, "the-base")
    run = make_run(tiny_model("llama"), lora)
    load_adapter(run.model, tmp_path)
    assert torch.equal(logits(run.model), logits(model))
    assert len(list(run.trainable())) == 2 * len(lora_layers(run.model))
    with pytest.raises(InputError, match="has a factor of"):
        load_adapter(make_run(tiny_model("llama"), LoRA(rank=3, alpha=6)).model, tmp_path)
    with pytest.raises(InputError, match="alpha"):
        load_adapter(make_run(tiny_model("llama"), LoRA(rank=4, alpha=3)).model, tmp_path)
    with pytest.raises(InputError, match="not those"):
        load_adapter(make_run(tiny_model("llama"), LoRA(rank=4, target_modules=("q_proj",))).model, tmp_path)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "is no adapter"),
        (lambda folder: (folder / WEIGHTS).unlink(), "is missing"),
        (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "peft_type is None"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"nonsense"), "damaged"),
        (edit_config(peft_type="IA3"), "peft_type is 'IA3'"),
        (edit_config(use_dora=True), "needs a lora_magnitude_vector"),
        (edit_config(init_lora_weights="olora"), "init_lora_weights 'olora'"),
        (edit_tensors(lambda tensors: tensors.pop(FIRST)), "one of the two factors"),
        (edit_tensors(lambda tensors: tensors.clear()), "no LoRA factor"),
        (edit_tensors(lambda tensors: tensors.update(other=torch.ones(2))), "has a tensor 'other'"),
        (edit_tensors(lambda tensors: tensors.update({FIRST: torch.ones(3, 4)})), "has a factor of"),
    ],
)
def test_clear_errors(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    lora = LoRA(rank=4)
    save_adapter(trained(tiny_model("llama"), lora), lora, tmp_path, "the-base")
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        load_adapter(tiny_model("llama"), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    lora = LoRA(rank=4)
    save_adapter(trained(tiny_model("llama"), lora), lora, tmp_path, "the-base")
    with pytest.raises(InputError, match=r"has a layer 'model.layers.0.mlp.down_proj', the model not"):
        load_adapter(tiny_model("gpt2"), tmp_path)
    with pytest.raises(InputError, match="has a factor of"):
        load_adapter(tiny_model("llama", hidden_size=64), tmp_path)


def test_one_name_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    lora = LoRA(rank=2, modules_to_save=("lm_head",))
    save_adapter(trained(tiny_model("llama", tie_word_embeddings=False), lora), lora, tmp_path, "the-base")
    with pytest.raises(InputError, match="one tensor"):
        load_adapter(tiny_model("llama", tie_word_embeddings=True), tmp_path)


def test_saving_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no LoRA layer"):
        save_adapter(tiny_model("llama"), LoRA(), tmp_path, "the-base")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save_adapter(trained(tiny_model("llama"), LoRA()), LoRA(), tmp_path / "file" / "adapter", "the-base")
