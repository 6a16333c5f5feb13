"""LitGPT's model and the lines of its `finetune.lora` and `finetune.full` loops, in bf16-true, one document at a time.

LitGPT's command reads its own data modules and checkpoints; here its model, its LoRA, its chunked cross entropy and its
Fabric are driven by the same lines, on the records of the setting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import record
import torch
from litgpt.lora import GPT as LoRAModel  # noqa: N811 - what it is here
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import mark_only_lora_as_trainable
from litgpt.model import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file


def options(folder: Path) -> dict[str, Any]:
    shape = json.loads((folder / "config.json").read_text())
    rope = shape.get("rope_parameters") or {"rope_theta": shape.get("rope_theta", 10000.0)}
    return {
        "name": "made",
        "block_size": shape["max_position_embeddings"],
        "vocab_size": shape["vocab_size"],
        "padded_vocab_size": shape["vocab_size"],
        "n_layer": shape["num_hidden_layers"],
        "n_head": shape["num_attention_heads"],
        "n_query_groups": shape["num_key_value_heads"],
        "n_embd": shape["hidden_size"],
        "head_size": shape["head_dim"],
        "intermediate_size": shape["intermediate_size"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": shape["rms_norm_eps"],
        "mlp_class_name": "LLaMAMLP",
        "rope_base": int(rope["rope_theta"]),
    }


def train(setting: dict[str, Any], steps: record.Steps) -> tuple[Any, str]:
    folder = Path(setting["model"])
    is_lora = setting["method"] == "lora"
    if setting["method"] == "qlora":
        raise SystemExit("LitGPT's NF4 needs CUDA (lightning's BitsandbytesPrecision)")
    parts = ("query", "key", "value", "projection", "mlp")
    adapters = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, **{f"lora_{part}": True for part in parts}}
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision="bf16-true")
    torch.manual_seed(0)
    with fabric.init_module():
        model: Any = LoRAModel(LoRAConfig(**options(folder), **adapters)) if is_lora else GPT(Config(**options(folder)))
    # From scratch too: the folder's weights are random, and LitGPT draws its own so that tied heads have a loss of 168.
    weights = load_file(folder / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    converted: dict[str, Any] = {}
    copy_weights_hf_llama(model.config, {}, converted, weights)
    model.load_state_dict(converted, strict=False)
    model.lm_head.weight = model.transformer.wte.weight  # tied, as in the model of the setting
    if is_lora:
        mark_only_lora_as_trainable(model)
        model.lm_head.weight.requires_grad_(False)
    model.max_seq_length = setting["longest"]
    model = fabric.setup_module(model)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(learnt, lr=setting["learning_rate"], weight_decay=0.0))
    size = setting["documents"]
    for start in range(0, len(setting["train"]), size):
        batch = setting["train"][start : start + size]
        steps.begin()
        for document in batch:  # micro_batch_size 1 is its default
            ids, _, labels = record.padded([document], 2)
            logits = model(ids, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, labels[..., 1:])
            fabric.backward(loss / len(batch))
        optimizer.step()
        optimizer.zero_grad()
        steps.end(sum(len(document["input_ids"]) for document in batch))
    model.eval()
    return lambda ids: model(ids), f"litgpt 0.5, lightning {lightning.__version__}"


if __name__ == "__main__":
    record.run(train)
