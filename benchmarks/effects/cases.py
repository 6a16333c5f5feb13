"""What each method is measured against: a recipe without it and the same recipe with it, and the rates of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FP32 = {"precision": {"compute": "fp32"}}
LORA = {"lora": {"rank": 8}, **FP32}
FULL = {"adamw": {}, **FP32}
LORA_RATE, FULL_RATE = 2e-3, 5e-4


@dataclass(frozen=True)
class Effect:
    """One comparison.

    Attributes:
        method: whose effect is measured.
        without, with_it: methods of both recipes.
        rate, rate_with: learning rates; optimizers need their own.
        changes: other sections of both.
    """

    method: str
    without: dict[str, Any]
    with_it: dict[str, Any]
    rate: float = LORA_RATE
    rate_with: float = LORA_RATE
    changes: dict[str, Any] = field(default_factory=dict)


def added(method: str, options: dict[str, Any] | None = None, **changes: Any) -> Effect:
    """Return a method on top of LoRA."""
    return Effect(method, LORA, {**LORA, method: options or {}}, changes=changes)


def in_the_place_of(method: str, options: dict[str, Any], without: dict[str, Any], **rates: float) -> Effect:
    """Return an adapter in the place of another."""
    return Effect(method, without, {method: options, **FP32}, **rates)


def optimizer(method: str, rate: float, options: dict[str, Any] | None = None) -> Effect:
    """Return an optimizer in the place of AdamW, everything trained."""
    return Effect(method, FULL, {method: options or {}, **FP32}, rate=FULL_RATE, rate_with=rate)


EFFECTS: tuple[Effect, ...] = (
    added("packing", {"row_tokens": 512}),
    Effect("stream", {**LORA, "checkpointing": {}}, {**LORA, "checkpointing": {}, "stream": {}}),
    Effect(
        "initialize", FULL, {**FULL, "initialize": {}}, FULL_RATE, FULL_RATE,
        {"model": {"name": "embedded", "weights": "random"}},
    ),
    added("quantize", {"kind": "nf4"}),
    in_the_place_of("freeze", {"train": ["*norm*"]}, FULL, rate=FULL_RATE, rate_with=LORA_RATE),
    in_the_place_of("lora", {"rank": 8}, FULL, rate=FULL_RATE),
    in_the_place_of("dora", {"rank": 8}, LORA),
    in_the_place_of("lora_fa", {"rank": 8}, LORA),
    in_the_place_of("dylora", {"rank": 8}, LORA),
    Effect(
        "qalora",
        {**LORA, "quantize": {"kind": "nf4"}},
        {"qalora": {"rank": 8}, "quantize": {"kind": "int4"}, **FP32},
    ),
    in_the_place_of("bottleneck", {"size": 16}, LORA),
    in_the_place_of("peft", {"kind": "IA3"}, LORA),
    Effect("precision", LORA, {"lora": {"rank": 8}, "precision": {"compute": "bf16"}}),
    Effect(
        "attention", {**LORA, "attention": {"kind": "eager"}}, {**LORA, "attention": {"kind": "per_document"}}
    ),
    added("checkpointing"),
    added("offload_activations", {"to": "disk"}),
    Effect("whole_loss", {**LORA, "supervised_loss": {}}, {**LORA, "whole_loss": {}}),
    Effect("supervised_loss", {**LORA, "whole_loss": {}}, {**LORA, "supervised_loss": {}}),
    added("kl_to_base", {"beta": 0.1}),
    optimizer("sgd", 0.3, {"momentum": 0.9}),
    optimizer("adagrad", 5e-3),
    optimizer("rmsprop", FULL_RATE),
    optimizer("adam", FULL_RATE),
    Effect("adamw", {"sgd": {}, **FP32}, FULL, 0.3, FULL_RATE),
    optimizer("adamw_8bit", FULL_RATE),
    optimizer("adafactor", 5e-3),
    optimizer("lion", 1e-4),
    optimizer("adamw_4bit", FULL_RATE),
    optimizer("adam_mini", FULL_RATE),
    optimizer("apollo", FULL_RATE, {"rank": 16}),
    optimizer("fp8_lm", FULL_RATE),
    added("l2_sp", {"strength": 1.0}),
    Effect("pad", {"lora": {"rank": 6}, **FP32}, {"lora": {"rank": 6}, "pad": {}, **FP32}),
    added("fused"),
)  # fmt: skip

NOT_HERE = {"paged_adamw_8bit": "it needs a GPU"}
