"""From a line of a table of published speeds to a recipe, a machine and tokens a second, or to why there are none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published_settings import normal_name
from transformers import AutoConfig, PretrainedConfig

from tunewise.errors import InputError
from tunewise.machine.catalogue import find
from tunewise.machine.machine import Machine
from tunewise.recipe import ModelSpec
from tunewise.workload.model import context_length, load_config

MOST_GPUS = 8
"""Of one node; between nodes the network decides."""

MPT = {
    "125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16), "3b": (2560, 32, 20),
    "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56), "70b": (8192, 80, 64),
}  # fmt: skip
"""hidden size, blocks, heads: llm-foundry's configurations."""

MPT_VOCABULARY = 50368

PURE_BF16 = {"compute": "bf16", "trainable": "same"}
MIXED_BF16 = {"compute": "bf16"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "amp_bf16": MIXED_BF16, "bf16_mixed": MIXED_BF16, "bf16": PURE_BF16, "bfloat16": PURE_BF16, "bf16_true": PURE_BF16,
    "amp_fp16": {"compute": "fp16"}, "fp16_mixed": {"compute": "fp16"}, "16_mixed": {"compute": "fp16"},
    "fp32": {"compute": "fp32"}, "float32": {"compute": "fp32"}, "tf32": {"compute": "tf32"},
}  # fmt: skip

REPLICATED = re.compile(r"(no|none|no_shard|single|single[ _-]gpu|ddp|1)?", re.IGNORECASE)
"""Every GPU updates the whole model."""

SHARDED = re.compile(r"(full_shard|shard_grad_op|hybrid_shard|fsdp2?|zero[ _-]?[123])", re.IGNORECASE)
"""Every GPU of the node updates its share."""


class LeftOut(Exception):
    """Why a row cannot be reproduced."""


@dataclass(frozen=True)
class Row:
    """One published measurement as a recipe.

    Attributes:
        update_share: of the optimizer's update, what one GPU does.
        measured: tokens a second of one GPU.
        assumed: what the table does not say.
    """

    config: PretrainedConfig
    methods: dict[str, Any]
    length: int
    micro_batch_size: int
    accumulation: int
    machine: Machine
    num_gpus: int
    update_share: float
    measured: float
    assumed: tuple[str, ...] = ()


def text(line: Mapping[str, Any], column: str) -> str:
    """Return a cell, stripped; empty where the table has no such column."""
    cell = line.get(column)
    return cell.strip() if isinstance(cell, str) else ""


def read(line: Mapping[str, Any], configs: Mapping[str, Path]) -> Row:
    """Return a line of the CSV as a recipe.

    Args:
        line: the cells by column.
        configs: configurations by normal name.

    Raises:
        LeftOut: it cannot be reproduced, and why.
        InputError: the model's configuration cannot be read.
    """
    status = text(line, "status")
    if status != "measured":
        raise LeftOut(f"status '{status}', not measured")
    if "compile" in re.sub(r"compile:? (false|no|off)", "", text(line, "conditions").lower()):
        raise LeftOut("torch.compile, which no recipe has")
    if text(line, "activation_cpu_offload").lower() not in ("", "false", "no"):
        raise LeftOut("activations offloaded to the host")
    num_gpus, length = _whole(line, "n_gpus"), _whole(line, "seq_len")
    if num_gpus > MOST_GPUS:
        raise LeftOut("more than one node")
    assumed: list[str] = []
    micro_batch_size, accumulation = _batch(line, num_gpus, assumed)
    measured = _tokens_per_second(line, num_gpus, length)
    return Row(
        config=config_of(text(line, "model"), length, configs),
        methods=methods_of(line, assumed),
        length=length,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        machine=machine_of(text(line, "gpu")),
        num_gpus=num_gpus,
        update_share=_update_share(text(line, "sharding"), num_gpus),
        measured=measured,
        assumed=tuple(assumed),
    )


def _whole(line: Mapping[str, Any], column: str) -> int:
    cell = text(line, column)
    if not re.fullmatch(r"[1-9]\d{0,8}(\.0+)?", cell):
        raise LeftOut(f"{column} '{cell}' is no whole number" if cell else f"{column} is not stated")
    return int(float(cell))


def _positive(line: Mapping[str, Any], column: str) -> float | None:
    cell = text(line, column)
    if not cell:
        return None
    if not re.fullmatch(r"\d+(\.\d*)?([eE][+-]?\d{1,2})?", cell) or not 0 < float(cell) < 1e12:
        raise LeftOut(f"{column} '{cell}' is no speed")
    return float(cell)


def _tokens_per_second(line: Mapping[str, Any], num_gpus: int, length: int) -> float:
    """Return those of one GPU: as stated, or of all, or from samples that are all `length` long."""
    of_one = _positive(line, "throughput_tokens_s_gpu")
    if of_one is not None:
        return of_one
    of_all = _positive(line, "throughput_tokens_s")
    if of_all is not None:
        return of_all / num_gpus
    samples = _positive(line, "throughput_samples_s")  # often rounded, so it is asked for last
    if samples is not None:
        return samples * length / num_gpus
    raise LeftOut("no tokens a second (a time without the number of tokens)")


def _batch(line: Mapping[str, Any], num_gpus: int, assumed: list[str]) -> tuple[int, int]:
    """Return (rows at once, micro-batches a step); one of them follows from the global batch where it is not stated."""
    if not text(line, "micro_batch") and text(line, "global_batch"):
        accumulation = _whole(line, "grad_accum") if text(line, "grad_accum") else 1
        rows, rest = divmod(_whole(line, "global_batch"), num_gpus * accumulation)
        if rest or not rows:
            raise LeftOut("micro_batch is not stated, and the global batch is no multiple of the GPUs' steps")
        return rows, accumulation
    micro_batch_size = _whole(line, "micro_batch")
    if text(line, "grad_accum"):
        return micro_batch_size, _whole(line, "grad_accum")
    if text(line, "global_batch"):
        accumulation, rest = divmod(_whole(line, "global_batch"), num_gpus * micro_batch_size)
        if not rest and accumulation:
            return micro_batch_size, accumulation
    assumed.append("one micro-batch a step")
    return micro_batch_size, 1


def _update_share(sharding: str, num_gpus: int) -> float:
    if num_gpus == 1 or REPLICATED.fullmatch(sharding):
        return 1.0
    if SHARDED.fullmatch(sharding):
        return 1.0 / num_gpus
    raise LeftOut(f"sharding '{sharding}'")


def config_of(model: str, length: int, configs: Mapping[str, Path]) -> PretrainedConfig:
    """Return the configuration of a model's name.

    Raises:
        LeftOut: there is none, or the model cannot read so many tokens.
        InputError: it cannot be read.
    """
    size = model.lower().removeprefix("mpt-")
    if model.lower().startswith("mpt-") and size in MPT:
        hidden_size, num_blocks, num_heads = MPT[size]
        # The same products as MPT: a plain feed-forward of four times the width, one head each, a tied vocabulary.
        return AutoConfig.for_model(
            "gpt_neox",
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_blocks,
            num_attention_heads=num_heads,
            vocab_size=MPT_VOCABULARY,
            max_position_embeddings=length,
            use_parallel_residual=False,
            tie_word_embeddings=True,
        )
    file = configs.get(normal_name(model))
    if file is None:
        raise LeftOut(f"no configuration of the model '{model}'")
    config = load_config(ModelSpec(name=str(file)))
    if length > context_length(config):
        raise LeftOut(f"seq_len {length} is beyond the model's {context_length(config)}")
    return config


def methods_of(line: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    """Return the recipe's methods; what the table does not say is added to `assumed`.

    Raises:
        LeftOut: it is no recipe, or it is not said clearly enough.
    """
    kind, precision = text(line, "kind").lower(), re.sub(r"[\s-]+", "_", text(line, "precision").lower())
    is_lora, is_packed = "lora" in kind, "qlora" in kind
    if not is_lora and not re.search(r"\b(pre-?training|full|sft)\b", kind):
        raise LeftOut(f"the kind '{text(line, 'kind')}' is no recipe" if kind else "kind is not stated")
    if is_lora and re.search(r"\bdora|adalora|qalora|lora-?fa|loha|lokr", kind):
        raise LeftOut(f"the kind '{text(line, 'kind')}' is no recipe")
    if precision in ("nf4", "fp4") and is_lora:
        is_packed, precision = True, "bf16"
        assumed.append("products in bf16 over 4-bit weights")
    if precision not in PRECISIONS:
        raise LeftOut(f"precision {text(line, 'precision')}" if precision else "precision is not stated")
    methods: dict[str, Any] = {"precision": PRECISIONS[precision], "whole_loss": {}}
    if is_lora:
        rank = re.search(r"\b(?:r|rank)\s*[=:]?\s*(\d{1,4})\b", kind)
        if rank is None:
            assumed.append("LoRA's rank")
        methods["lora"] = {} if rank is None else {"rank": int(rank.group(1))}
    if is_packed:
        methods["quantize"] = {"kind": "fp4" if "fp4" in text(line, "precision").lower() else "nf4"}
    checkpointing = text(line, "activation_ckpt").lower()
    if checkpointing in ("true", "yes", "full", "on"):
        methods["checkpointing"] = {}
    elif checkpointing not in ("false", "no", "none", "off"):
        raise LeftOut(f"activation checkpointing '{checkpointing}'" if checkpointing else "activation checkpointing is "
                      "not stated")  # fmt: skip
    return methods


def machine_of(gpu: str) -> Machine:
    """Return the catalogue's machine.

    Raises:
        LeftOut: it has none of this name, or it is no GPU whose kernels are known.
    """
    if not gpu:
        raise LeftOut("gpu is not stated")
    try:
        machine = find(gpu.replace("_", " "))
    except InputError as error:
        raise LeftOut(str(error)) from None
    if machine.kind != "cuda":
        raise LeftOut(f"{machine.name} is no GPU that runs CUDA or ROCm")
    return machine
