"""From a row of a table of published measurements to a recipe and its shapes, or to the reason why there is none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from published_litgpt import EarlyBitsandbytes, FusedLoRA, OwnAttention
from published_peft import (
    IN_BASE_DTYPE,
    LibraryAdapters,
    LossOfAllPositions,
    is_rewritten,
    kind_of,
    library_dora,
    peft_method,
)
from published_rows import Row, Unusable
from published_stacks import Stack, stack_of
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tunewise.engine.device_profile import CUDA, CUDA_HOPPER, DeviceProfile
from tunewise.engine.dry_run import BatchShape
from tunewise.layers.linear import is_linear
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
    LoRAFA,
    PagedAdamW8bit,
    Peft,
    Precision,
    Quantize,
    complete,
)
from tunewise.methods.attention import default_attention_kind
from tunewise.recipe import BatchSpec, DataSpec, Method, ModelSpec, Recipe, TrainingSpec

OPTIMIZERS: dict[str, Method] = {
    "adamw": AdamW(), "adamw_torch": AdamW(), "adamw_torch_fused": AdamW(), "adamw_hf": AdamW(),
    "adamw8bit": AdamW8bit(), "adamw_8bit": AdamW8bit(), "adamw_bnb_8bit": AdamW8bit(),
    "paged_adamw_8bit": PagedAdamW8bit(), "pagedadamw8bit": PagedAdamW8bit(),
    "adafactor": Adafactor(), "sgd": SGD(), "lion": Lion(), "lora-fa": AdamW(),
}  # fmt: skip

METHODS = {
    "lora": "lora", "qlora": "lora", "rslora": "lora", "lora+": "lora", "lora +rslora": "lora", "lora +dora": "dora",
    "dora": "dora", "full": "full",
    "full fine-tuning": "full", "full finetuning": "full", "sft full": "full", "ln_tuning": "norms",
}  # fmt: skip
"""Published names; all of lora's variants here have the same tensors, but "dora"."""

OWN_SHAPES: dict[str, dict[str, Any]] = {
    "stablelm-base-alpha-3b": {
        "model_type": "gpt_neox", "vocab_size": 50688, "hidden_size": 4096, "intermediate_size": 16384,
        "num_hidden_layers": 16, "num_attention_heads": 32, "max_position_embeddings": 4096, "rotary_pct": 0.25,
        "use_parallel_residual": True, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Shapes that no file is there for, by normal name; from litgpt/config.py, its padded vocabulary."""

OTHER_HARDWARE = re.compile(
    r"\b(tpu|trainium\d?|trn\d|inferentia\d?|gaudi\d?|hpu|ipu|ascend|npu|apple|mps|m[1-5]( (pro|max|ultra))?|cpu|xeon|"
    r"epyc)\b"
)
"""What is no GPU that runs CUDA or ROCm, whose allocator and kernels the prediction is of."""

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
    config = _config_of(row.text("model"), configs)
    stack = stack_of(row.text("repo"))
    if stack.is_tied is not None:
        config.tie_word_embeddings = stack.is_tied
    if stack.has_fused_gelu and getattr(config, "hidden_act", None) == "gelu_new":
        config.hidden_act = "gelu_pytorch_tanh"
    kind = METHODS.get(row.text("method").lower()) or ("peft" if kind_of(row.text("method")) else None)
    if kind is None:
        raise Unusable(f"the method '{row.text('method')}' is no recipe")
    if is_rewritten(kind_of(row.text("method")), row.text("conditions")):
        raise Unusable(f"peft has rewritten '{row.text('method')}' since")
    micro_batch, length = row.number("micro_batch"), row.number("seq_len")
    accumulation = row.number("grad_accum") if row.text("grad_accum") else 1
    adapter = _adapter(row, kind, config, stack)
    has_virtual_tokens = any(isinstance(method, Peft) and method.is_prompt_learning for method in adapter)
    loss = LossOfAllPositions() if has_virtual_tokens else stack.loss()
    methods = [_precision(row, kind, stack), _attention(row, config), loss, _optimizer(row)]
    methods += [*adapter, *_quantization(row, kind, stack), *_checkpointing(row)]
    if stack.is_litgpt:
        methods.append(OwnAttention())
    recipe = Recipe(
        model=ModelSpec(name="published", weights="random"),
        data=DataSpec(source="published", max_length=length),
        methods=tuple(methods),
        batch=BatchSpec(documents=micro_batch * accumulation, micro_batch_size=micro_batch),
        training=TrainingSpec(max_grad_norm=stack.max_grad_norm),
    )
    is_hopper = re.search(r"\b(H100|H200|H20|H800|GH200)\b", row.text("gpu")) is not None
    keeps_previous = stack.is_litgpt and any(isinstance(method, Quantize) for method in methods)
    shapes = (BatchShape.uniform(micro_batch, length),) * (2 if keeps_previous else min(accumulation, 2))
    completed = complete(recipe, config, torch.device("cuda"))
    return Setting(config, completed, CUDA_HOPPER if is_hopper else CUDA, shapes)


def _config_of(model: str, configs: dict[str, Path]) -> PretrainedConfig:
    name = normal_name(model)
    if name in configs:
        return AutoConfig.from_pretrained(configs[name], local_files_only=True)
    if name in OWN_SHAPES:
        return AutoConfig.for_model(**OWN_SHAPES[name])
    raise Unusable(f"no configuration of the model '{model}'" if model else "the model is not stated")


def _check_conditions(row: Row) -> None:
    status, everything = row.text("status"), f"{row.text('conditions')} {row.text('seq_note')}".lower()
    if status != "measured":
        raise Unusable(f"status '{status}', not measured")
    if not re.fullmatch(r"1(\.0+)?", row.text("n_gpus")) or row.text("parallelism"):
        raise Unusable(f"not one GPU alone (n_gpus '{row.text('n_gpus')}', parallelism '{row.text('parallelism')}')")
    if OTHER_HARDWARE.search(row.text("gpu").lower()):
        raise Unusable(f"'{row.text('gpu')}' is no GPU that runs CUDA or ROCm")
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
    keeps_dtype = kind == "norms" or kind_of(row.text("method")) in IN_BASE_DTYPE
    trainable = "same" if keeps_dtype else stack.adapter
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


def _adapter(row: Row, kind: str, config: PretrainedConfig, stack: Stack) -> list[Method]:
    if kind == "full":
        return []
    if kind == "norms":
        return [Freeze(train=("*norm.weight",))]
    words = [word for word in re.split(r"[+,\s]+", row.text("adapter_targets")) if word]
    if kind == "peft":
        size = row.number("adapter_rank") if row.text("adapter_rank") else None
        names = [name for word in words for name in _layers_called(word, config) or [word]]
        made = peft_method(kind_of(row.text("method")) or "", size, names, row.text("path"), config)
        return [made, LibraryAdapters(autocasts=stack.autocasts)]
    rank, words = row.number("adapter_rank"), [word.lower() for word in words]
    make = LoRAFA if row.text("optimizer").lower() == "lora-fa" else LoRA
    if not words:
        raise Unusable("adapter_targets are not stated")
    layers: Method = LibraryAdapters(autocasts=stack.autocasts)
    if stack.is_litgpt:
        layers = FusedLoRA(num_parts=len({"q", "k", "v"} & set(words)))
    if row.text("adapter_targets").lower() in ("all-linear", "all linear", "all_linear", "all"):
        if kind == "dora":
            return [library_dora(rank, stack.lora_dropout, "all-linear"), layers]
        return [make(rank=rank, dropout=stack.lora_dropout), layers]
    targets: list[str] = []
    for word in words:
        meant = _layers_called(word, config)
        if not meant:
            raise Unusable(f"adapter_targets '{word}': no such layer in a {config.model_type}")
        targets += meant
    targets = list(dict.fromkeys(targets))
    if kind == "dora":
        return [library_dora(rank, stack.lora_dropout, targets), layers]
    return [make(rank=rank, dropout=stack.lora_dropout, target_modules=tuple(targets)), layers]


def _layers_called(word: str, config: PretrainedConfig) -> list[str]:
    """Return the linear layers of this architecture that a table's word for targets means; [] where there is none."""
    with torch.device("meta"):
        shallow = AutoConfig.for_model(**{**config.to_dict(), "num_hidden_layers": 1, "layer_types": None})
        modules = AutoModelForCausalLM.from_config(shallow).named_modules()
    known = {name.split(".")[-1] for name, module in modules if is_linear(module)}
    word = word.lower()
    meant = [name for name in TARGETS.get(word, (word,)) if name in known]
    return meant if word == "mlp" else meant[:1]


def _quantization(row: Row, kind: str, stack: Stack) -> list[Method]:
    text = row.text("quantization").lower()
    if not text and "qlora" not in row.text("method").lower():
        return []
    if kind != "lora":  # "dora" over packed weights unpacks them for its norms, which nobody has compared
        raise Unusable(f"quantization '{text}' with the method '{row.text('method')}'")
    found = re.search(r"nf4|fp4", text)
    if found is None and text and not re.fullmatch(r"(int4|4-?bit) \(bnb\)", text):
        raise Unusable(f"quantization '{text}' is no recipe")
    is_double = stack.double_quant or "dq" in text or "double" in text
    skipped = () if stack.quantizes_head else ("lm_head",)
    kind_of_bits: Literal["nf4", "fp4"] = "fp4" if found is not None and found.group() == "fp4" else "nf4"
    quantize = Quantize(kind=kind_of_bits, double_quant=is_double, skip_modules=skipped)
    return [quantize, EarlyBitsandbytes()] if stack.is_litgpt else [quantize]


def _checkpointing(row: Row) -> list[Method]:
    text = row.text("grad_ckpt").lower()
    if text in ("no", "false", "none", "off"):
        return []
    if text in ("yes", "true", "full", "on"):
        return [Checkpointing()]
    raise Unusable(f"gradient checkpointing '{text}'" if text else "gradient checkpointing is not stated")
