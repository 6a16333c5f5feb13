"""From a row of a table of published measurements to a recipe and its shapes, or to the reason why there is none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from published_stacks import DEFAULT_STACK, STACKS, EarlyBitsandbytes, Stack
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tunewise.engine.device_profile import CUDA, CUDA_HOPPER, DeviceProfile
from tunewise.engine.dry_run import BatchShape
from tunewise.layers.linear import linear_layers
from tunewise.methods import (
    SGD,
    Adafactor,
    AdamW,
    AdamW8bit,
    Attention,
    Checkpointing,
    Freeze,
    Lion,
    LoRA,
    PagedAdamW8bit,
    Precision,
    Quantize,
    complete,
)
from tunewise.methods.attention import default_attention_kind
from tunewise.planner.choose import SAFETY_MARGIN
from tunewise.recipe import BatchSpec, DataSpec, Method, ModelSpec, Recipe, TrainingSpec

COMPOSED_DROPOUT = 1e-6
"""A dropout so small that it only selects the composed path of our LoRA layer."""

OPTIMIZERS: dict[str, Method] = {
    "adamw": AdamW(), "adamw_torch": AdamW(), "adamw_torch_fused": AdamW(), "adamw_hf": AdamW(),
    "adamw8bit": AdamW8bit(), "adamw_8bit": AdamW8bit(), "adamw_bnb_8bit": AdamW8bit(),
    "paged_adamw_8bit": PagedAdamW8bit(), "pagedadamw8bit": PagedAdamW8bit(),
    "adafactor": Adafactor(), "sgd": SGD(), "lion": Lion(),
}  # fmt: skip

METHODS = {
    "lora": "lora", "qlora": "lora", "rslora": "lora", "lora+": "lora", "lora +rslora": "lora", "full": "full",
    "full fine-tuning": "full", "full finetuning": "full", "sft full": "full", "ln_tuning": "norms",
}  # fmt: skip
"""Published names; all of lora's variants here have the same tensors."""

TARGETS = {
    "q": ("q_proj", "query_key_value", "qkv_proj", "c_attn"), "k": ("k_proj", "query_key_value", "qkv_proj", "c_attn"),
    "v": ("v_proj", "query_key_value", "qkv_proj", "c_attn"), "o": ("o_proj", "dense", "out_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
    "head": ("lm_head", "embed_out"),
}  # fmt: skip
"""Short names of targets and which layers of an architecture they can mean; attention's own layers come first."""

ALIASES = {
    "tiny-llama": "tinyllama-1.1b", "mistral-7b": "mistral-7b-v0.1", "mistral-7b-v0.2": "mistral-7b-v0.1",
    "llama-3-70b": "llama-3.1-70b", "mixtral-8x7b": "mixtral-8x7b-v0.1",
}  # fmt: skip
"""Other names of the same shapes."""


class Unusable(Exception):
    """Why a row cannot be reproduced."""


@dataclass
class Row:
    """A published row with its prediction, or why there is none."""

    cells: dict[str, str]
    predicted_gb: float | None = None
    published_gb: float | None = None
    metric: str = ""
    reason: str | None = None

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        assert self.predicted_gb is not None
        assert self.published_gb is not None
        return (self.predicted_gb - self.published_gb) / self.published_gb

    @property
    def is_beyond_margin(self) -> bool:
        """Whether a planner that trusts the prediction would run out of memory in spite of its safety margin."""
        assert self.predicted_gb is not None
        assert self.published_gb is not None
        return self.predicted_gb / (1 - SAFETY_MARGIN) < self.published_gb

    def text(self, column: str) -> str:
        """Return a cell, stripped; empty where the table has no such column."""
        return (self.cells.get(column) or "").strip()

    def number(self, column: str) -> int:
        """Return a cell that must hold a whole positive number."""
        text = self.text(column)
        if not re.fullmatch(r"[1-9]\d{0,8}(\.0+)?", text):
            raise Unusable(f"{column} is not stated" if not text else f"{column} '{text}' is no whole number")
        return int(float(text))


@dataclass(frozen=True)
class Setting:
    """All that a dry run depends on."""

    config: PretrainedConfig
    recipe: Recipe
    profile: DeviceProfile
    shapes: tuple[BatchShape, ...]

    @property
    def key(self) -> str:
        """Equal for equal settings."""
        return f"{self.config.to_json_string()} {self.recipe.id} {self.profile} {self.shapes}"


def normal_name(name: str) -> str:
    """Return a model's name without owner, case, separators and the words that do not change its shape."""
    name = re.sub(r"[\s_]+", "-", name.split("/")[-1].strip().lower())
    name = re.sub(r"^(meta-|unsloth-)?(code)?llama(?=\d)", lambda m: f"{m.group(2) or ''}llama-", name)
    name = name.removeprefix("meta-").removeprefix("hf-")
    name = re.sub(r"-(hf|instruct|chat|it|base|deduped|bnb-4bit|text|instruct-v0\.\d)$", "", name)
    name = re.sub(r"-(hf|instruct|chat|it|base)$", "", name)
    return ALIASES.get(name, name)


def load_configs(folder: Path) -> dict[str, Path]:
    """Return the shapes that we have, by normal name."""
    return {normal_name(path.stem): path for path in sorted(folder.glob("*.json"))}


def setting_of(row: Row, configs: dict[str, Path]) -> Setting:
    """Return the row's setting.

    Raises:
        Unusable: something is not stated, or is no recipe of ours.
    """
    _check_conditions(row)
    path = configs.get(normal_name(row.text("model")))
    if path is None:
        raise Unusable(f"no configuration of the model '{row.text('model')}'")
    stack = STACKS.get(row.text("repo"), DEFAULT_STACK)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if stack.is_tied is not None:
        config.tie_word_embeddings = stack.is_tied
    if stack.has_fused_gelu and getattr(config, "hidden_act", None) == "gelu_new":
        config.hidden_act = "gelu_pytorch_tanh"
    kind = METHODS.get(row.text("method").lower())
    if kind is None:
        raise Unusable(f"the method '{row.text('method')}' is no recipe")
    micro_batch, length = row.number("micro_batch"), row.number("seq_len")
    accumulation = row.number("grad_accum") if row.text("grad_accum") else 1
    methods = [_precision(row, kind, stack), _attention(row, config), stack.loss(), _optimizer(row)]
    methods += [*_adapter(row, kind, config), *_quantization(row, kind, stack), *_checkpointing(row)]
    recipe = Recipe(
        model=ModelSpec(name="published", weights="random"),
        data=DataSpec(source="published", max_length=length),
        methods=tuple(methods),
        batch=BatchSpec(documents=micro_batch * accumulation, micro_batch_size=micro_batch),
        training=TrainingSpec(max_grad_norm=stack.max_grad_norm),
    )
    is_hopper = re.search(r"\b(H100|H200|H20|H800|GH200)\b", row.text("gpu")) is not None
    keeps_previous = stack.has_early_bitsandbytes and any(isinstance(method, Quantize) for method in methods)
    shapes = (BatchShape.uniform(micro_batch, length),) * (2 if keeps_previous else min(accumulation, 2))
    completed = complete(recipe, config, torch.device("cuda"))
    return Setting(config, completed, CUDA_HOPPER if is_hopper else CUDA, shapes)


def _check_conditions(row: Row) -> None:
    status, everything = row.text("status"), f"{row.text('conditions')} {row.text('seq_note')}".lower()
    if status != "measured":
        raise Unusable(f"status '{status}', not measured")
    if row.text("n_gpus") != "1" or row.text("parallelism"):
        raise Unusable(f"not one GPU alone (n_gpus '{row.text('n_gpus')}', parallelism '{row.text('parallelism')}')")
    if re.search(r"\bcompile\b(?!:? (false|no|off))", everything):
        raise Unusable("torch.compile, which no recipe has")
    for word in ("offload", "unsloth", "liger"):
        if word in f"{everything} {row.text('grad_ckpt')} {row.text('attention')} {row.text('method')}".lower():
            raise Unusable(f"'{word}', which no recipe has")
    if "..." in everything or "all of the above" in everything:
        raise Unusable("its settings are those of other rows")
    if "unpacked" in everything:
        raise Unusable("lengths below the maximum are not stated")


def _precision(row: Row, kind: str, stack: Stack) -> Method:
    text = row.text("base_precision").lower()
    is_mixed = "mixed" in text
    compute: Literal["bf16", "fp16", "fp32"]
    if text in ("bf16", "bfloat16", "bf16-true", "bf16-mixed", "bf16 mixed"):
        compute = "bf16"
    elif text in ("fp16", "float16", "16-mixed"):
        compute = "fp16"
    elif text in ("fp32", "float32", "32-true"):
        compute = "fp32"
    else:
        raise Unusable(f"precision '{text}' is not stated clearly")
    if is_mixed and kind != "full":
        raise Unusable(f"precision '{text}' keeps an fp32 copy of the frozen base, which no recipe does")
    if kind == "full":
        return Precision(compute=compute, trainable="fp32" if is_mixed or compute != "bf16" else "same")
    trainable = "same" if kind == "norms" else stack.adapter
    return Precision(compute=compute, trainable="fp32" if compute == "fp16" else trainable)


def _attention(row: Row, config: PretrainedConfig) -> Method:
    text = row.text("attention").lower()
    if "eager" in text:
        return Attention(kind="eager")
    if text and not re.search("sdpa|flash|fa2", text):
        raise Unusable(f"attention '{text}'")
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    if "flash" in text or "fa2" in text:  # of one document a row they keep what our attention keeps
        return Attention(kind=default_attention_kind(model_class))
    # transformers' own rule: sdpa where the architecture has it, else eager
    return Attention(kind="sdpa" if model_class._supports_sdpa else "eager")


def _optimizer(row: Row) -> Method:
    text = row.text("optimizer").lower().replace(" ", "_")
    if text not in OPTIMIZERS:
        raise Unusable(f"optimizer '{row.text('optimizer')}'" if text else "optimizer is not stated")
    return OPTIMIZERS[text]


def _adapter(row: Row, kind: str, config: PretrainedConfig) -> list[Method]:
    if kind == "full":
        return []
    if kind == "norms":
        return [Freeze(train=("*norm.weight",))]
    rank = row.number("adapter_rank")
    with torch.device("meta"):
        shallow = AutoConfig.for_model(**{**config.to_dict(), "num_hidden_layers": 1, "layer_types": None})
        names = [name.split(".")[-1] for name in linear_layers(AutoModelForCausalLM.from_config(shallow))]
    words = [word for word in re.split(r"[+,\s]+", row.text("adapter_targets").lower()) if word]
    if not words:
        raise Unusable("adapter_targets are not stated")
    if row.text("adapter_targets").lower() in ("all-linear", "all linear", "all_linear", "all"):
        return [LoRA(rank=rank, dropout=COMPOSED_DROPOUT)]
    targets: list[str] = []
    for word in words:
        meant = [name for name in TARGETS.get(word, (word,)) if name in names or (word == "head" and name == "lm_head")]
        if not meant:
            raise Unusable(f"adapter_targets '{word}': no such layer in a {config.model_type}")
        targets += meant if word == "mlp" else meant[:1]
    return [LoRA(rank=rank, dropout=COMPOSED_DROPOUT, target_modules=tuple(dict.fromkeys(targets)))]


def _quantization(row: Row, kind: str, stack: Stack) -> list[Method]:
    text = row.text("quantization").lower()
    if not text and "qlora" not in row.text("method").lower():
        return []
    if kind != "lora":
        raise Unusable(f"quantization '{text}' with the method '{row.text('method')}'")
    found = re.search(r"nf4|fp4", text)
    if found is None and text and not re.fullmatch(r"(int4|4-?bit) \(bnb\)", text):
        raise Unusable(f"quantization '{text}' is no recipe")
    is_double = stack.double_quant or "dq" in text or "double" in text
    skipped = () if stack.quantizes_head else ("lm_head",)
    kind_of_bits: Literal["nf4", "fp4"] = "fp4" if found is not None and found.group() == "fp4" else "nf4"
    quantize = Quantize(kind=kind_of_bits, double_quant=is_double, skip_modules=skipped)
    return [quantize, EarlyBitsandbytes()] if stack.has_early_bitsandbytes else [quantize]


def _checkpointing(row: Row) -> list[Method]:
    text = row.text("grad_ckpt").lower()
    if text in ("no", "false", "none", "off"):
        return []
    if text in ("yes", "true", "full", "on"):
        return [Checkpointing()]
    raise Unusable(f"gradient checkpointing '{text}'" if text else "gradient checkpointing is not stated")
