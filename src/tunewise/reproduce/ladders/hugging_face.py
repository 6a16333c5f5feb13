"""Hugging Face's guide "Methods and tools for efficient training on a single GPU" (2023), measured ladder.

BERT-large, sequence length 512, 512 random samples, V100 16 GB. Published memory is nvidia-smi's; about 1343 MB of it
are the CUDA context and kernels, which no tensor of ours corresponds to, so they are taken off.
"""

from __future__ import annotations

from typing import Any

from tunewise.reproduce.ladders.ladder import Ladder, Published, Row, Whole

CONTEXT_MB = 1343

SMALL = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip
"""17M parameters; with attention that keeps no scores, activations of 4 x 512 tokens are about 1.5 times weights,
gradients and optimizer state together, as BERT-large's were with scores kept."""

BERT_LARGE = {
    "hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 30522, "tie_word_embeddings": True,
}  # fmt: skip


def ladder(device: str) -> Ladder:
    """Return the ladder at the scale of `device`: "cpu" or "cuda"."""
    half = "bf16" if device == "cpu" else "fp16"
    both = "accumulation", "checkpointing", half
    return Ladder(
        name="hf",
        source="huggingface.co/docs/transformers/v4.20.1/en/perf_train_gpu_one (text of 2023)",
        setting="BERT-large, sequence 512, 512 random samples, V100 16 GB",
        units=("samples/s", "MB without the 1343 MB of CUDA context and kernels"),
        start="vanilla, batch 4",
        rows=_rows(half),
        wholes=(
            Whole("all of it", both),
            Whole("Adafactor, all of it", (*both, "Adafactor")),
            Whole("8-bit Adam, all of it", (*both, "8-bit Adam")),
        ),
        config=SMALL if device == "cpu" else BERT_LARGE,
        document_lengths=(512,),
        training={"steps": 8, "learning_rate": 1e-5, "max_grad_norm": 1.0, "schedule": "constant"},
        differences=(
            "a random Llama-like decoder with a language model's loss instead of BERT with a classifier's",
            "attention by SDPA, which keeps no scores, instead of the eager attention of 2022",
            "torch's fused AdamW where the table has the unfused one of transformers",
            *(("bf16 by autocast instead of fp16 with loss scaling",) if device == "cpu" else ()),
        ),
    )


def _rows(half: str) -> tuple[Row, ...]:
    start = "vanilla, batch 4"
    return (
        Row(start, _published(8.86, 14949), _recipe()),
        Row("batch 1 x 4", _published(7.75, 8681), _recipe(rows=1), start, "accumulation", True),
        Row(
            "batch 1 x 4, checkpointing",
            _published(5.99, 6775),
            _recipe(rows=1, checkpointing=True),
            "batch 1 x 4",
            "checkpointing",
            True,
            "the table adds checkpointing to accumulation only",
        ),
        Row("half precision, batch 4", _published(18.64, 13939), _recipe(compute=half), start, half, True),
        Row("all of it", _published(10.09, 7275), _all(half), start),
        Row("Adafactor, batch 4", _published(7.96, 12295), _recipe(optimizer="adafactor"), start, "Adafactor", True),
        Row("Adafactor, all of it", _published(9.06, 4847), _all(half, "adafactor"), start),
        Row("8-bit Adam, batch 4", _published(9.15, 13085), _recipe(optimizer="adamw_8bit"), start, "8-bit Adam", True),
        Row("8-bit Adam, all of it", _published(10.35, 5363), _all(half, "adamw_8bit"), start),
    )


def _published(samples_per_second: float, megabytes: float) -> Published:
    return Published(samples_per_second, megabytes - CONTEXT_MB)


def _all(half: str, optimizer: str = "adamw") -> dict[str, Any]:
    return _recipe(rows=1, checkpointing=True, compute=half, optimizer=optimizer)


def _recipe(
    *, rows: int = 4, checkpointing: bool = False, compute: str = "fp32", optimizer: str = "adamw"
) -> dict[str, Any]:
    methods: dict[str, Any] = {
        "precision": {"compute": compute, "trainable": "fp32"},
        "attention": {"kind": "sdpa"},
        "whole_loss": {},
        optimizer: {},
    }
    if checkpointing:
        methods["checkpointing"] = {}
    return {"methods": methods, "batch": {"documents": 4, "micro_batch_size": rows}}
