"""Tiny random models of every architecture that tunewise names, in fp32, with two or more layers of each
kind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 101

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE | {"head_dim": 8},
    "mistral": _LLAMA_LIKE | {"sliding_window": 6},
    "mixtral": _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _LLAMA_LIKE | {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma": _LLAMA_LIKE | {"head_dim": 8},
    "gemma2": _LLAMA_LIKE
    | {
        "head_dim": 8,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": _LLAMA_LIKE
    | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _LLAMA_LIKE | {"sliding_window": 6, "pad_token_id": 0},
    "phi": _LLAMA_LIKE | {"partial_rotary_factor": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon_alibi": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "olmo2": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE | {"pad_token_id": 0},
    "bitnet": _LLAMA_LIKE,
    "cohere": _LLAMA_LIKE | {"logit_scale": 0.25},
    "granite": _LLAMA_LIKE | {"logits_scaling": 3.0, "attention_multiplier": 0.5},
}
ARCHITECTURES = tuple(_SPECIAL)


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model without dropout, with weights large enough for every path to matter."""
    model_type = architecture.removesuffix("_alibi")
    options = {
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_SPECIAL[architecture],
        **changes,
    }
    without_dropout = {
        name: 0.0
        for name in AutoConfig.for_model(model_type).to_dict()
        if ("dropout" in name or name.endswith("_pdrop")) and name not in changes
    }
    config = AutoConfig.for_model(model_type, **{**without_dropout, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
