"""torchtune's model, its LoRA, its chunked loss and its packed rows, in the lines of `lora_finetune_single_device`.

Its recipe reads its own data sets; here the same components are driven by the same lines on the records of the setting.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import load_file
from torchtune.models import convert_weights
from torchtune.models.llama2 import llama2, lora_llama2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params


def model_of(setting: dict[str, Any]) -> Any:
    folder = Path(setting["model"])
    shape = json.loads((folder / "config.json").read_text())
    sizes = {
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "max_seq_len": shape["max_position_embeddings"],
        "intermediate_dim": shape["intermediate_size"],
        "norm_eps": shape["rms_norm_eps"],
    }
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    if setting["method"] == "lora":
        model = lora_llama2(
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            lora_rank=16,
            lora_alpha=32,
            **sizes,
        )
    elif setting["method"] == "qlora":
        raise SystemExit("torchtune's NF4 stores tensors of torchao's that its CPU build cannot multiply")
    else:
        model = llama2(**sizes)
    if setting["method"] != "scratch":
        weights = load_file(folder / "model.safetensors")
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        converted = convert_weights.hf_to_tune(
            weights, sizes["num_heads"], sizes["num_kv_heads"], sizes["embed_dim"], head_dim=shape["head_dim"]
        )
        model.load_state_dict(converted, strict=False)
    torch.set_default_dtype(torch.float32)
    if setting["method"] == "lora":
        set_trainable_params(model, get_adapter_params(model))
    return model


def packed(records: list[record.Record]) -> tuple[torch.Tensor, ...]:
    """One row with a block-diagonal mask, as its PackedDataset makes them."""
    ids = torch.tensor([[token for each in records for token in each["input_ids"]]])
    labels = torch.tensor([[label for each in records for label in [*each["labels"][1:], -100]]])
    positions = torch.cat([torch.arange(len(each["input_ids"])) for each in records])[None]
    document = torch.cat([torch.full((len(each["input_ids"]),), n) for n, each in enumerate(records)])
    mask = (document[:, None] == document[None]).tril()[None]
    return ids, labels, positions, mask


def train(setting: dict[str, Any], steps: record.Steps) -> tuple[Any, str]:
    model = model_of(setting)
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=setting["learning_rate"], weight_decay=0.0, fused=True)
    size = setting["documents"]
    for start in range(0, len(setting["train"]), size):
        batch = setting["train"][start : start + size]
        steps.begin()
        rows: list[list[record.Record]] = [[]]
        for document in batch:
            held = sum(len(each["input_ids"]) for each in rows[-1])
            if rows[-1] and held + len(document["input_ids"]) > setting["row_tokens"]:
                rows.append([])
            rows[-1].append(document)
        count = sum(label != -100 for document in batch for label in document["labels"][1:])
        for row in rows:
            ids, labels, positions, mask = packed(row)
            logits = model(ids, mask=mask, input_pos=positions)
            loss = loss_of(logits, labels) * (labels != -100).sum() / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.end(sum(len(document["input_ids"]) for document in batch))
    model.eval()
    model.set_num_output_chunks(0)
    return lambda ids: model(ids), f"torchtune {version('torchtune')}"


if __name__ == "__main__":
    record.run(train)
