"""The grid of `cpu.py`: small models of many architectures, each with many combinations of methods."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from tunewise.methods import complete
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import Recipe

VOCAB_SIZE = 4000
CPU = torch.device("cpu")

_LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 48},
    "mistral": _LLAMA | {"sliding_window": 64},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 192},
    "gemma2": _LLAMA | {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "gemma3_text": _LLAMA | {"head_dim": 32, "sliding_window": 64},
    "phi3": _LLAMA | {"pad_token_id": 0},
    "gpt2": {"n_embd": 128, "n_head": 4, "n_positions": 1024},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4},
    "opt": {"hidden_size": 128, "ffn_dim": 512, "num_attention_heads": 4, "word_embed_proj_dim": 128},
    "falcon": {"hidden_size": 128, "num_attention_heads": 4},
    "olmo2": _LLAMA,
}

DEPTHS = {"gemma3_text": (6, 7, 13)}
"""Numbers of blocks that rows use in turn; others take 2 to 6."""

_IN_BACKWARD = {"training": {"max_grad_norm": None}}
_QLORA = {"quantize": {"kind": "nf4"}, "lora": {"rank": 8}}
_INT8_LORA = {"quantize": {"kind": "int8"}, "lora": {"rank": 8}}
_BF16 = {"precision": {"compute": "bf16"}}
_PURE = {"precision": {"compute": "bf16", "trainable": "same"}}
_FP32 = {"precision": {"compute": "fp32"}}
_PACKED = {"packing": {"row_tokens": 192}}

COMBINATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full fp32": (_FP32, {}),
    "full fp32 whole": (_FP32 | {"whole_loss": {}}, {}),
    "full fp32 sdpa": (_FP32 | {"attention": {"kind": "sdpa"}}, {}),
    "full fp32 eager": (_FP32 | {"attention": {"kind": "eager"}, "whole_loss": {}}, {}),
    "full fp32 checkpointing": (_FP32 | {"checkpointing": {}}, {}),
    "full fp32 checkpointing every 2": (_FP32 | {"checkpointing": {"every": 2}, "whole_loss": {}}, {}),
    "full fp32 selective": (_FP32 | {"checkpointing": {"policy": "selective"}}, {}),
    "full fp32 sgd": (_FP32 | {"sgd": {}}, {}),
    "full fp32 momentum": (_FP32 | {"sgd": {"momentum": 0.9}, "checkpointing": {}}, {}),
    "full fp32 sgd in backward": (_FP32 | {"sgd": {"in_backward": True}}, _IN_BACKWARD),
    "full fp32 adamw in backward": (_FP32 | {"adamw": {"in_backward": True}, "checkpointing": {}}, _IN_BACKWARD),
    "full fp32 adafactor": (_FP32 | {"adafactor": {}, "checkpointing": {}}, {}),
    "full fp32 lion": (_FP32 | {"lion": {}}, {}),
    "full fp32 adamw 8-bit": (_FP32 | {"adamw_8bit": {}, "checkpointing": {}}, {}),
    "full fp32 rmsprop": (_FP32 | {"rmsprop": {}}, {}),
    "full fp32 adagrad": (_FP32 | {"adagrad": {}}, {}),
    "full fp32 unfused": (_FP32 | {"adamw": {"fused": False}}, {}),
    "full fp32 packed": (_FP32 | _PACKED, {}),
    "full fp32 packed sdpa": (_FP32 | _PACKED | {"attention": {"kind": "sdpa"}}, {}),
    "full mixed": (_BF16, {}),
    "full mixed whole": (_BF16 | {"whole_loss": {}}, {}),
    "full mixed checkpointing": (_BF16 | {"checkpointing": {}}, {}),
    "full mixed selective eager": (
        _BF16 | {"checkpointing": {"policy": "selective"}, "attention": {"kind": "eager"}},
        {},
    ),
    "full mixed packed": (_BF16 | _PACKED, {}),
    "full pure": (_PURE, {}),
    "full pure checkpointing whole": (_PURE | {"checkpointing": {}, "whole_loss": {}}, {}),
    "full pure adafactor in backward": (
        _PURE | {"adafactor": {"in_backward": True}, "checkpointing": {}},
        _IN_BACKWARD,
    ),
    "lora fp32": (_FP32 | {"lora": {"rank": 8}}, {}),
    "lora fp32 checkpointing": (_FP32 | {"lora": {"rank": 8}, "checkpointing": {}}, {}),
    "lora fp32 dropout": (_FP32 | {"lora": {"rank": 8, "dropout": 0.1}, "checkpointing": {"every": 2}}, {}),
    "lora fp32 selective whole": (
        _FP32 | {"lora": {"rank": 16}, "checkpointing": {"policy": "selective"}, "whole_loss": {}},
        {},
    ),
    "lora mixed": (_BF16 | {"lora": {"rank": 8}}, {}),
    "lora mixed sdpa packed": (_BF16 | _PACKED | {"lora": {"rank": 8}, "attention": {"kind": "sdpa"}}, {}),
    "lora and norms fp32": (_FP32 | {"lora": {"rank": 8}, "freeze": {"train": ["*norm*", "*ln_*"]}}, {}),
    "norms only fp32": (_FP32 | {"freeze": {"train": ["*norm*", "*ln_*"]}, "checkpointing": {}}, {}),
    "nf4 lora fp32": (_FP32 | _QLORA, {}),
    "nf4 lora mixed": (_BF16 | _QLORA, {}),
    "nf4 lora mixed checkpointing": (_BF16 | _QLORA | {"checkpointing": {}}, {}),
    "nf4 lora mixed packed": (_BF16 | _QLORA | _PACKED, {}),
    "int8 lora mixed": (_BF16 | _INT8_LORA, {}),
    "int8 lora fp32 checkpointing whole": (_FP32 | _INT8_LORA | {"checkpointing": {}, "whole_loss": {}}, {}),
    "nf4 lora lion 8-bit": (_BF16 | _QLORA | {"adamw_8bit": {}, "checkpointing": {"policy": "selective"}}, {}),
    "full fp32 adamw 4-bit": (_FP32 | {"adamw_4bit": {}, "checkpointing": {}}, {}),
    "full fp32 adam-mini": (_FP32 | {"adam_mini": {}}, {}),
    "full fp32 apollo": (_FP32 | {"apollo": {"rank": 8}}, {}),
    "full pure fp8_lm": (_PURE | {"fp8_lm": {}, "checkpointing": {}}, {}),
    "full fp32 fp8_lm": (_FP32 | {"fp8_lm": {"gradient": "fp32", "master": "fp32"}}, {}),
}

LENGTHS = (48, 64, 96, 128, 160)
ROWS = (1, 2, 3)


def config_of(architecture: str, depth: int) -> PretrainedConfig:
    """Return a small model's configuration, without dropout."""
    options = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, **ARCHITECTURES[architecture]}
    config = AutoConfig.for_model(architecture, num_hidden_layers=depth, **options)
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@dataclass(frozen=True)
class Case:
    """One row: what is run, and in which shape."""

    architecture: str
    combination: str
    depth: int
    rows: int
    length: int
    supervised: float
    micro_batches: int

    def config(self) -> PretrainedConfig:
        """Return the architecture's configuration in this case's depth."""
        return config_of(self.architecture, self.depth)

    def recipe(self, config: PretrainedConfig) -> Recipe:
        """Return the complete recipe."""
        methods, changes = COMBINATIONS[self.combination]
        mapping = {
            "model": {"name": self.architecture, "weights": "random"},
            "data": {"source": "none"},
            "methods": methods,
            "batch": {"documents": self.rows * self.micro_batches, "micro_batch_size": self.rows},
            "training": {},
        }
        return complete(recipe_from_mapping({**mapping, **changes}, "benchmark"), config, CPU)


def cases(seed: int, only: list[str]) -> Iterator[Case]:
    """Yield every architecture with every combination, batch and length varied at random (but always the same)."""
    for number, combination in enumerate(COMBINATIONS):
        for place, architecture in enumerate(ARCHITECTURES):
            if only and architecture not in only:
                continue
            draw = random.Random(f"{seed} {architecture} {combination}")
            depths = DEPTHS.get(architecture, (2, 3, 4, 5, 6))
            packed, in_backward = "packed" in combination, "in backward" in combination
            yield Case(
                architecture,
                combination,
                depth=depths[(number + place) % len(depths)],
                rows=draw.choice(ROWS[:2] if packed else ROWS),
                length=192 if packed else draw.choice(LENGTHS),
                supervised=draw.choice((0.25, 0.6, 1.0)),
                micro_batches=1 if in_backward else draw.choice((1, 1, 2)),
            )
