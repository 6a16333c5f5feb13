"""What can be done: every method of tunewise, in one tuple that anyone can grep."""

from __future__ import annotations

from tunewise.methods.attention import Attention
from tunewise.methods.checkpointing import Checkpointing
from tunewise.methods.defaults import complete
from tunewise.methods.freezing import Freeze
from tunewise.methods.lora import LoRA
from tunewise.methods.loss import SupervisedLoss, WholeLoss
from tunewise.methods.method import Run
from tunewise.methods.optimizers import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    AdamW8bit,
    Lion,
    PagedAdamW8bit,
    RMSProp,
)
from tunewise.methods.packing import Packing
from tunewise.methods.peft import Peft
from tunewise.methods.precision import Precision
from tunewise.methods.quantization import Quantize
from tunewise.recipe import Method

ALL: tuple[type[Method], ...] = (
    Packing,
    Quantize,
    Freeze,
    LoRA,
    Peft,
    Precision,
    Attention,
    Checkpointing,
    WholeLoss,
    SupervisedLoss,
    SGD,
    Adagrad,
    RMSProp,
    Adam,
    AdamW,
    AdamW8bit,
    PagedAdamW8bit,
    Adafactor,
    Lion,
)
"""Every method, in the order of the slots."""

BY_NAME: dict[str, type[Method]] = {method.name: method for method in ALL}

__all__ = [
    "ALL",
    "BY_NAME",
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamW8bit",
    "Attention",
    "Checkpointing",
    "Freeze",
    "Lion",
    "LoRA",
    "Packing",
    "PagedAdamW8bit",
    "Peft",
    "Precision",
    "Quantize",
    "RMSProp",
    "Run",
    "SupervisedLoss",
    "WholeLoss",
    "complete",
]
