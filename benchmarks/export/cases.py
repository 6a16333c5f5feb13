"""The recipes that `accept.py` exports: one plain recipe, changed in one respect at a time, and several shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tunewise.methods import complete
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import Recipe
from tunewise.workload.model import load_config

CONFIGS = Path(__file__).parents[3] / "shared" / "data" / "configs"

ARCHITECTURES = (
    "CodeLlama-7b-hf", "Llama-2-7b-hf", "Llama-3.1-8B", "Llama-3.2-1B", "Meta-Llama-3-8B", "Mistral-7B-v0.1",
    "Mixtral-8x7B-v0.1", "OLMo-2-1124-7B", "Phi-3-mini-4k-instruct", "Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-30B-A3B",
    "Qwen3-8B", "SmolLM2-135M", "falcon-7b", "gemma-2-9b", "gemma-2b", "gemma-3-1b-text", "gpt2", "phi-2", "phi-4",
    "pythia-1.4b",
)  # fmt: skip
MAIN = "Llama-3.1-8B"

LORA: dict[str, Any] = {"lora": {}, "precision": {"compute": "bf16"}}
FULL: dict[str, Any] = {"precision": {"compute": "bf16"}}
QLORA: dict[str, Any] = {**LORA, "quantize": {}}
PACKING: dict[str, Any] = {"packing": {}}
ADAM = {"beta1": 0.85, "beta2": 0.95, "eps": 1e-7}

METHODS: dict[str, dict[str, Any]] = {
    "lora padded": LORA,
    "lora packed": LORA | PACKING,
    "qlora padded": QLORA,
    "qlora packed": QLORA | PACKING,
    "full padded": FULL,
    "full packed": FULL | PACKING,
    "full pure bf16": {"precision": {"compute": "bf16", "trainable": "same"}},
    "lora pure bf16": {**LORA, "precision": {"compute": "bf16", "trainable": "same"}},
    "lora fp32": {**LORA, "precision": {"compute": "fp32"}},
    "lora fp16": {**LORA, "precision": {"compute": "fp16"}},
    "lora tf32": {**LORA, "precision": {"compute": "tf32"}},
    "full fp16": {"precision": {"compute": "fp16"}},
    "qlora fp4 single": {**QLORA, "quantize": {"kind": "fp4", "double_quant": False}},
    "qlora int8": {**QLORA, "quantize": {"kind": "int8"}},
    "qlora skip": {**QLORA, "quantize": {"skip_modules": ["lm_head", "down_proj"]}},
    "checkpointing": {**LORA, "checkpointing": {}},
    "checkpointing every other": {**LORA, "checkpointing": {"every": 2}},
    "checkpointing selective": {**LORA, "checkpointing": {"policy": "selective"}},
    "checkpointing selective full": {**FULL, "checkpointing": {"policy": "selective"}},
    "attention sdpa": {**LORA, "attention": {"kind": "sdpa"}},
    "attention eager": {**LORA, "attention": {"kind": "eager"}},
    "attention flash": {**LORA, "attention": {"kind": "flash"}},
    "whole loss": {**LORA, "whole_loss": {}},
    "supervised loss": {**FULL, "supervised_loss": {"chunk_tokens": 512}},
    "sgd": {**LORA, "sgd": {"momentum": 0.9, "nesterov": True}},
    "adagrad": {**LORA, "adagrad": {}},
    "rmsprop": {**LORA, "rmsprop": {"momentum": 0.1}},
    "adam": {**LORA, "adam": ADAM},
    "adamw": {**LORA, "adamw": ADAM},
    "adamw not fused": {**LORA, "adamw": {"fused": False}},
    "adamw_8bit": {**LORA, "adamw_8bit": ADAM},
    "paged_adamw_8bit": {**LORA, "paged_adamw_8bit": {}},
    "adafactor": {**FULL, "adafactor": {}},
    "lion": {**LORA, "lion": {}},
    "lora names": {**LORA, "lora": {"target_modules": ["q_proj", "v_proj"], "rank": 8, "alpha": 24, "dropout": 0.05}},
    "lora one name": {**LORA, "lora": {"target_modules": ["q_proj"], "use_rslora": True}},
    "lora layers": {**LORA, "lora": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 1, 5]}},
    "lora expression": {**LORA, "lora": {"target_modules": r".*\.self_attn\.[qkv]_proj"}},
    "lora saves": {**LORA, "lora": {"modules_to_save": ["embed_tokens"], "lora_plus_ratio": 16.0}},
    "lora pissa": {**LORA, "lora": {"init": "pissa", "alpha": 12.5}},
    "lora gaussian": {**LORA, "lora": {"init": "gaussian", "exclude_modules": ["down_proj"]}},
    "freeze": {**FULL, "freeze": {"train": ["*norm*", "model.layers.3?.*"]}},
}
"""What is changed in the methods; each with the records and the rest of `recipe`."""

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"training": {"schedule": "linear", "warmup": 0}},
    "linear floor": {"training": {"schedule": "linear", "final_learning_rate": 0.1}},
    "cosine floor": {"training": {"final_learning_rate": 0.1, "warmup": 25}},
    "constant": {"training": {"schedule": "constant", "warmup": 0.1}},
    "wsd": {"training": {"schedule": "wsd", "steps": 200}},
    "inverse_sqrt": {"training": {"schedule": "inverse_sqrt", "warmup": 100}},
    "steps": {"training": {"steps": 77, "weight_decay": 0.1, "max_grad_norm": None}},
    "tokens": {"training": {"tokens": 1_000_000}},
    "half an epoch": {"training": {"epochs": 0.5}},
    "uneven batch": {"batch": {"documents": 15, "micro_batch_size": 4}},
    "batch of tokens": {"batch": {"supervised_tokens": 32768, "micro_batch_size": 2}},
    "intervals": {"evaluation": {"every": 50, "patience": 3}, "checkpoints": {"every": 100, "keep": 5}},
    "uneven intervals": {"evaluation": {"every": 40}, "checkpoints": {"every": 100}},
    "no evaluation": {"data": {"validation_fraction": 0.0}},
    "own validation": {"data": {"validation": "records/messages.jsonl"}},
    "limited": {"data": {"max_records": 10, "too_long": "drop", "max_length": 512}},
    "reports": {"report_to": ["wandb", "tensorboard"], "seed": 2**40, "out": "runs/here"},
    "cpu": {"device": "cpu"},
    "system": {"data": {"system_prompt": "Be brief."}},
    "pretrain": {"objective": "pretrain", "data": {"source": "records/text.jsonl"}, "model": {"weights": "random"}},
    "continue": {"objective": "continue", "data": {"source": "records/text.jsonl"}},
    "alpaca": {"data": {"source": "records/alpaca.jsonl"}},
    "prompt-completion": {"data": {"source": "records/pairs.jsonl"}},
    "renamed pairs": {"data": {"source": "records/questions.jsonl"}},
    "sharegpt": {"data": {"source": "records/sharegpt.jsonl"}},
}
"""What is changed in the other sections, with LoRA."""

RECORDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "Hi {0}"}, {"role": "assistant", "content": "Hello {0}"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi {0}"}, {"from": "gpt", "value": "Hello {0}"}]},
    "alpaca": {"instruction": "Say {0}", "input": "", "output": "This is {0}"},
    "pairs": {"prompt": "Say {0}", "completion": "This is {0}"},
    "questions": {"question": "Say {0}?", "answer": "This is {0}"},
    "text": {"text": "This is text number {0}. It is about nothing in particular, and it ends here."},
}


def write_inputs(folder: Path) -> None:
    """Write 20 records of each format and a folder with a config.json for each architecture."""
    for name, record in RECORDS.items():
        lines = [json.dumps(record).replace("{0}", str(number)) for number in range(20)]
        file = folder / "records" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    for name in ARCHITECTURES:
        target = folder / "models" / name / "config.json"
        target.parent.mkdir(parents=True)
        shutil.copy(CONFIGS / f"{name}.json", target)


def recipes() -> Iterator[tuple[str, Recipe]]:
    """Yield (label, complete recipe); the working folder is the one of `write_inputs`."""
    for name in ARCHITECTURES:
        for label in ("lora packed", "qlora padded", "full padded"):
            yield f"{name}: {label}", _completed(name, METHODS[label], {})
    for label, methods in METHODS.items():
        yield f"{MAIN}: {label}", _completed(MAIN, methods, {})
    for label, changes in SETTINGS.items():
        methods = {**LORA, "precision": {"compute": "fp32"}} if changes.get("device") == "cpu" else LORA
        yield f"{MAIN}: {label}", _completed(MAIN, FULL if label == "pretrain" else methods, changes)
        yield f"{MAIN}: {label}, packed", _completed(MAIN, methods | PACKING, changes)


def _completed(name: str, methods: dict[str, Any], changes: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "model": {"name": f"models/{name}"},
        "data": {"source": "records/messages.jsonl", "max_length": 1024},
        "device": "cuda",
    }
    merged = {**base, **{key: {**base[key], **value} if key in ("model", "data") else value
                         for key, value in changes.items()}}  # fmt: skip
    recipe = recipe_from_mapping({**merged, "methods": methods})
    return complete(recipe, load_config(recipe.model), torch.device(merged["device"]))
