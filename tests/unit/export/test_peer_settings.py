"""What each tool's file says for what the recipe says."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, get_scheduler

from tests.unit.export.test_peers import LORA, completed, content, exported, named
from tunewise.engine.schedule import learning_rate_factor
from tunewise.errors import InputError
from tunewise.export.peers import peer_config
from tunewise.export.peers.torchtune_models import BUILDERS, builder_for
from tunewise.methods.naming import select
from tunewise.recipe import TrainingSpec

PACKED: dict[str, Any] = {**LORA, "packing": {"row_tokens": 4096}}
TRAINERS = ("axolotl", "llamafactory", "trl")
"""Tools over transformers' Trainer."""

ROWS = {
    "axolotl": ("micro_batch_size", "gradient_accumulation_steps"),
    "llamafactory": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "torchtune": ("batch_size", "gradient_accumulation_steps"),
    "trl": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "unsloth": ("batch_size", "gradient_accumulation_steps"),
}


def rows(written: dict[str, Any], peer: str) -> tuple[int, int]:
    section = written["training"] if peer == "unsloth" else written
    micro, accumulation = ROWS[peer]
    return section[micro], section[accumulation]


@pytest.mark.parametrize("peer", sorted(ROWS))
def test_without_packing_a_step_has_as_many_rows_as_documents(peer: str) -> None:
    recipe = completed(batch={"documents": 24, "micro_batch_size": 3})
    assert rows(content(recipe, peer), peer) == (3, 8)
    assert "batch.documents" not in named(recipe, peer)
    uneven = completed(batch={"documents": 10, "micro_batch_size": 4})
    assert rows(content(uneven, peer), peer) == (4, 3)
    assert "4 x 3 = 12 rows" in named(uneven, peer)["batch.documents"]


@pytest.mark.parametrize("peer", sorted(ROWS))
def test_with_packing_a_step_has_as_many_rows_as_its_tokens_fill(peer: str) -> None:
    recipe = completed(PACKED, batch={"documents": 64, "micro_batch_size": 2})
    assert rows(content(recipe, peer, tokens_per_step=32768.0), peer) == (2, 4)
    assert rows(content(recipe, peer, tokens_per_step=900.0), peer) == (1, 1)
    assert rows(content(recipe, peer), peer) == (2, 16)  # 64 documents of 2048 tokens at most
    assert "fixed number of packed rows" in named(recipe, peer)["batch.documents"]
    by_tokens = completed(batch={"supervised_tokens": 65536, "micro_batch_size": 2})
    assert rows(content(by_tokens, peer), peer) == (2, 16)
    assert "batch.supervised_tokens" in named(by_tokens, peer)


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"schedule": "linear"},
    "linear to a floor": {"schedule": "linear", "final_learning_rate": 0.2},
    "cosine": {"schedule": "cosine"},
    "cosine to a floor": {"schedule": "cosine", "final_learning_rate": 0.1},
    "constant": {"schedule": "constant"},
    "wsd": {"schedule": "wsd", "final_learning_rate": 0.1},
    "inverse_sqrt": {"schedule": "inverse_sqrt"},
}


@pytest.mark.parametrize("warmup", [0, 10, 0.25])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_is_ours(name: str, warmup: float) -> None:
    """transformers' own schedule, made from what is written, has our learning rate in every step after warm-up."""
    training = {**SCHEDULES[name], "steps": 100, "warmup": warmup, "learning_rate": 0.5}
    written = content(completed(training=training), "trl")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=written["learning_rate"])
    count = round(warmup * 100) if warmup < 1 else int(warmup)
    scheduler = get_scheduler(
        written["lr_scheduler_type"], optimizer, num_warmup_steps=count, num_training_steps=100,
        scheduler_specific_kwargs=written.get("lr_scheduler_kwargs"),
    )  # fmt: skip
    theirs = []
    for _ in range(100):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    spec = TrainingSpec(**training)
    ours = [0.5 * learning_rate_factor(spec, step, 100) for step in range(100)]
    start = max(count, 1)  # while it warms up they begin at 0, we one step higher
    if name == "inverse_sqrt" and warmup == 0:  # ours stays at 1 for two steps, theirs for one
        ours = [ours[0], *ours[2:], 0.5 * learning_rate_factor(spec, 100, 100)]
    assert theirs[start:] == pytest.approx(ours[start:], rel=1e-6)
    assert theirs[count] == pytest.approx(0.5)


OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd": ({"momentum": 0.9, "nesterov": True}, {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"}),
    "adagrad": ({"eps": 1e-9}, {"optim": "adagrad", "optim_args": "eps=1e-09"}),
    "rmsprop": ({"decay": 0.9}, {"optim": "rmsprop", "optim_args": "alpha=0.9,momentum=0.0,eps=1e-08"}),
    "adamw": ({"beta2": 0.95}, {"optim": "adamw_torch_fused", "adam_beta1": 0.9, "adam_beta2": 0.95}),
    "adamw_8bit": ({"eps": 1e-7}, {"optim": "adamw_8bit", "adam_epsilon": 1e-7}),
    "paged_adamw_8bit": ({}, {"optim": "paged_adamw_8bit"}),
    "lion": ({"beta2": 0.98}, {"optim": "lion_32bit", "adam_beta1": 0.9, "adam_beta2": 0.98}),
    "adafactor": ({}, {"optim": "adafactor"}),
}


@pytest.mark.parametrize("peer", TRAINERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_the_trainer(name: str, peer: str) -> None:
    options, expected = OPTIMIZERS[name]
    recipe = completed({**LORA, name: options}, training={"weight_decay": 0.1, "max_grad_norm": None})
    written = content(recipe, peer)
    optimizer = "optimizer" if peer == "axolotl" else "optim"
    for key, value in {**expected, "weight_decay": 0.1, "max_grad_norm": 0.0}.items():
        assert written[optimizer if key == "optim" else key] == value
    assert (name in named(recipe, peer)) == (name == "adafactor")


def test_adam_differs_only_when_weights_decay() -> None:
    plain = completed({**LORA, "adam": {"fused": False}})
    assert content(plain, "trl")["optim"] == "adamw_torch"
    assert "adam" not in named(plain, "trl")
    decaying = completed({**LORA, "adam": {}}, training={"weight_decay": 0.1})
    assert "coupled weight decay" in named(decaying, "trl")["adam"]
    assert content(decaying, "torchtune")["optimizer"]["_component_"] == "torch.optim.Adam"


PRECISIONS: list[tuple[str, dict[str, Any], dict[str, Any], bool]] = [
    ("full, masters", {"precision": {"compute": "bf16"}}, {"dtype": "float32", "bf16": True}, True),
    ("full, pure", {"precision": {"compute": "bf16", "trainable": "same"}}, {"dtype": "bfloat16", "bf16": False}, True),
    ("adapter", LORA, {"dtype": "bfloat16", "bf16": True}, True),
    ("fp16", {**LORA, "precision": {"compute": "fp16"}}, {"dtype": "float16", "fp16": True, "bf16": False}, True),
    ("fp32", {**LORA, "precision": {}}, {"dtype": "float32", "fp16": False, "bf16": False, "tf32": False}, True),
    ("quantized", {**LORA, "quantize": {}}, {"dtype": "bfloat16", "bf16": True}, False),
    ("tf32", {**LORA, "precision": {"compute": "tf32"}}, {"dtype": "float32", "tf32": True}, True),
]


@pytest.mark.parametrize(
    ("methods", "expected", "is_same"), [case[1:] for case in PRECISIONS], ids=[c[0] for c in PRECISIONS]
)
def test_precision_in_trl(methods: dict[str, Any], expected: dict[str, Any], is_same: bool) -> None:
    recipe = completed(methods)
    written = content(recipe, "trl")
    assert {key: written[key] for key in expected} == expected
    assert ("precision.trainable" not in named(recipe, "trl")) == is_same


@pytest.fixture(scope="module")
def module_names() -> list[str]:
    """Names of a llama of twelve blocks."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                num_hidden_layers=12, hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=99
            )
        )
    return [name for name, _ in model.named_modules() if name]


@pytest.mark.parametrize("layers", [None, [1], [0, 3, 11]])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "down_proj"], r".*\.mlp\.\w+_proj"])
def test_targets_select_the_same_modules_through_trl(targets: Any, layers: Any, module_names: list[str]) -> None:
    """TRL makes a list of one name a text, which peft takes for an expression over the whole name."""
    if layers is not None and isinstance(targets, str):
        pytest.skip("named as missing")
    lora = {"target_modules": targets, "layers_to_transform": layers}
    written = content(completed({**LORA, "lora": lora}), "trl")["lora_target_modules"]
    if len(written) == 1:
        theirs = [name for name in module_names if re.fullmatch(written[0], name)]
    else:
        theirs = [name for name in module_names if any(name == one or name.endswith("." + one) for one in written)]
    wanted = targets if isinstance(targets, str) else tuple(targets)
    ours = select(module_names, wanted, "targets")
    if layers is not None:
        ours = [name for name in ours if int(name.split(".")[2]) in layers]
    assert theirs == ours != []


def test_adapters() -> None:
    lora = {
        "rank": 8,
        "alpha": 20.5,
        "use_rslora": True,
        "lora_plus_ratio": 16.0,
        "init": "pissa",
        "layers_to_transform": [2],
    }
    recipe = completed({**LORA, "lora": lora})
    axolotl = content(recipe, "axolotl")
    assert (axolotl["adapter"], axolotl["lora_r"], axolotl["lora_alpha"]) == ("lora", 8, 20)
    assert axolotl["peft_init_lora_weights"] == "pissa"
    assert axolotl["peft_layers_to_transform"] == [2]
    assert axolotl["loraplus_lr_ratio"] == 16.0
    assert set(named(recipe, "axolotl")) & {f"lora.{name}" for name in lora} == {"lora.alpha"}
    expected = {"lora.alpha", "lora.lora_plus_ratio", "lora.init", "lora.layers_to_transform"}
    assert set(named(recipe, "trl")) & {f"lora.{name}" for name in lora} == expected
    factory = content(recipe, "llamafactory")
    assert (factory["pissa_init"], factory["use_rslora"], factory["lora_target"]) == (True, True, "all")
    tune = content(recipe, "torchtune")["model"]
    assert (tune["lora_rank"], tune["lora_alpha"], tune["apply_lora_to_mlp"]) == (8, 20.5, True)
    assert content(completed({"precision": {}}), "trl")["use_peft"] is False


def test_quantization() -> None:
    recipe = completed(
        {**LORA, "quantize": {"kind": "fp4", "double_quant": False, "skip_modules": ["lm_head", "o_proj"]}}
    )
    trl, axolotl = content(recipe, "trl"), content(recipe, "axolotl")
    assert (trl["load_in_4bit"], trl["bnb_4bit_quant_type"], trl["use_bnb_nested_quant"]) == (True, "fp4", False)
    assert axolotl["adapter"] == "qlora"
    assert axolotl["bnb_config_kwargs"] == {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": ["lm_head", "o_proj"],
    }
    assert "quantize.skip_modules" in named(recipe, "trl")
    assert "quantize.skip_modules" not in named(recipe, "axolotl")
    eight = completed({**LORA, "quantize": {"kind": "int8"}})
    assert content(eight, "axolotl")["adapter"] == "lora"
    assert content(eight, "llamafactory")["quantization_bit"] == 8
    assert "NF4 only" in named(eight, "unsloth")["quantize.kind"]
    assert content(completed({**LORA, "quantize": {}}), "torchtune")["model"]["quantize_base"] is True


def test_packing_in_trl_and_llamafactory() -> None:
    recipe = completed(PACKED, data={"source": "owner/chats", "max_length": 1024})
    trl = content(recipe, "trl")
    assert (trl["packing"], trl["packing_strategy"], trl["max_length"]) == (True, "bfd", 4096)
    assert trl["pad_to_multiple_of"] == 64
    assert "one length for rows and documents" in named(recipe, "trl")["data.max_length"]
    assert content(recipe, "llamafactory")["neat_packing"] is True  # without it documents would see each other
    assert content(completed(data={"source": "owner/chats", "max_length": 1024}), "trl")["max_length"] == 1024


def test_checkpointing() -> None:
    assert content(completed(), "trl")["gradient_checkpointing"] is False  # TRL's default is True
    assert content(completed(), "llamafactory")["disable_gradient_checkpointing"] is True
    selective = completed({"precision": {}, "checkpointing": {"policy": "selective", "every": 2}})
    assert content(selective, "trl")["gradient_checkpointing_kwargs"] == {"use_reentrant": False, "selective": True}
    assert "aten::mm" in content(selective, "axolotl")["selective_checkpointing"]["save"]
    for peer in ("trl", "axolotl", "llamafactory", "torchtune", "unsloth"):
        assert "checkpointing.every" in named(selective, peer)


@pytest.mark.parametrize("peer", TRAINERS)
def test_evaluation_and_saving(peer: str) -> None:
    plain = content(completed(), peer)
    assert (plain["eval_steps"], plain["save_steps"], plain["load_best_model_at_end"]) == (0.1, 0.1, True)
    uneven = completed(evaluation={"every": 40}, checkpoints={"every": 100})
    assert content(uneven, peer)["save_steps"] == 40  # the Trainer refuses to keep the best otherwise
    assert "saves when it evaluates" in named(uneven, peer)["checkpoints.every"]
    even = completed(evaluation={"every": 50}, checkpoints={"every": 100, "keep": 7})
    assert (content(even, peer)["save_steps"], content(even, peer)["save_total_limit"]) == (100, 7)
    without = completed(data={"source": "owner/chats", "validation_fraction": 0.0})
    assert content(without, peer)["eval_strategy"] == "no"
    assert "load_best_model_at_end" not in content(without, peer)


def test_seeds_beyond_numpy() -> None:
    recipe = completed(seed=2**32 + 5)
    assert content(recipe, "trl")["seed"] == 5
    assert "numpy's seeds end" in named(recipe, "trl")["seed"]


@pytest.mark.parametrize("pattern", ["*norm*", "model.layers.2[23].*", "lm_head.weight", "*.[!q]_proj.weight", "*bias"])
def test_frozen_parameters_in_axolotl(pattern: str, module_names: list[str]) -> None:
    """axolotl makes every dot literal that no plus follows, and matches from the beginning."""
    recipe = completed({"precision": {}, "freeze": {"train": [pattern]}})
    (written,) = content(recipe, "axolotl")["unfrozen_parameters"]
    expression = re.compile(re.sub(r"\.(?!\+)", "\\.", written))
    names = [f"{name}.weight" for name in module_names] + ["model.layers.22.norm.bias", "model.layersX22.mlp"]
    assert [n for n in names if expression.match(n)] == [n for n in names if fnmatch.fnmatchcase(n, pattern)]


def test_torchtune_builders_are_found_by_shape() -> None:
    for builder in BUILDERS:
        family = builder.family
        names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
        config = LlamaConfig(**dict(zip(names, builder.shape, strict=True)), num_attention_heads=8)
        config.model_type = family.model_type
        config.max_position_embeddings = family.context or 4096
        assert builder_for(config) == builder


def test_torchtune_has_no_builder_for_every_model() -> None:
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, intermediate_size=1536, vocab_size=49152, num_attention_heads=9
    )
    with pytest.raises(InputError, match=r"builds no 'llama' with hidden_size 576.*it has code_llama2_13b"):
        peer_config(completed(), "torchtune", config=config)


def test_torchtune_names_recipe_and_download() -> None:
    config = exported(completed(), "torchtune")
    assert "# For the recipe lora_finetune_single_device." in config.text
    download, command = config.command.splitlines()
    assert download.startswith("tune download owner/llama --output-dir models/llama")
    assert command == "tune run lora_finetune_single_device --config llama.torchtune.yaml"
    full = exported(completed({"precision": {}, "sgd": {"in_backward": True}}, training={"max_grad_norm": None},
                              batch={"documents": 4, "micro_batch_size": 4}), "torchtune")  # fmt: skip
    assert "For the recipe full_finetune_single_device." in full.text
    assert "optimizer_in_bwd: true" in full.text


def test_unsloth_counts_steps() -> None:
    recipe = completed(training={"epochs": 2.0, "warmup": 0.1, "schedule": "linear"})
    known = content(recipe, "unsloth", num_steps=250)["training"]
    assert (known["num_epochs"], known["max_steps"], known["warmup_steps"], known["save_steps"]) == (2, 0, 25, 25)
    assert content(recipe, "unsloth")["training"]["warmup_steps"] == 0
    assert "not known" in named(recipe, "unsloth")["training.warmup"]
    half = content(completed(training={"epochs": 0.5}), "unsloth", num_steps=40)["training"]
    assert (half["num_epochs"], half["max_steps"]) == (1, 40)


def test_a_local_model_folder_lists_its_files(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).touch()
    written = content(completed(model=str(tmp_path)), "torchtune")
    assert written["checkpointer"]["checkpoint_files"] == sorted(file.name for file in tmp_path.iterdir())
    assert written["checkpointer"]["checkpoint_dir"] == str(tmp_path)
