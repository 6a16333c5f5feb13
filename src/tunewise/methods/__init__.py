"""What can be done: every method of tunewise, in one tuple that anyone can grep."""

from __future__ import annotations

from tunewise.methods.attention import Attention
from tunewise.methods.bottleneck import BottleneckAdapter
from tunewise.methods.checkpointing import Checkpointing
from tunewise.methods.defaults import complete
from tunewise.methods.dylora import DyLoRA
from tunewise.methods.fp8_lm import FP8LM
from tunewise.methods.freezing import Freeze
from tunewise.methods.fused import Fused
from tunewise.methods.initialization import Initialize
from tunewise.methods.lean_optimizers import AdamMini, AdamW4bit, Apollo
from tunewise.methods.lora import LoRA
from tunewise.methods.lora_variants import DoRA, LoRAFA
from tunewise.methods.loss import SupervisedLoss, WholeLoss
from tunewise.methods.method import Run
from tunewise.methods.offload import OffloadActivations
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
from tunewise.methods.padding import Pad
from tunewise.methods.peft import Peft
from tunewise.methods.precision import Precision
from tunewise.methods.qalora import QALoRA
from tunewise.methods.quantization import Quantize
from tunewise.methods.retention import L2SP, KLToBase
from tunewise.methods.streaming import Stream
from tunewise.recipe import Method

ALL: tuple[type[Method], ...] = (
    Packing,
    Stream,
    Initialize,
    Quantize,
    Freeze,
    LoRA,
    DoRA,
    LoRAFA,
    DyLoRA,
    QALoRA,
    BottleneckAdapter,
    Peft,
    Precision,
    Attention,
    Checkpointing,
    OffloadActivations,
    WholeLoss,
    SupervisedLoss,
    KLToBase,
    SGD,
    Adagrad,
    RMSProp,
    Adam,
    AdamW,
    AdamW8bit,
    PagedAdamW8bit,
    Adafactor,
    Lion,
    AdamW4bit,
    AdamMini,
    Apollo,
    FP8LM,
    L2SP,
    Pad,
    Fused,
)
"""Every method, in the order of the slots."""

BY_NAME: dict[str, type[Method]] = {method.name: method for method in ALL}

__all__ = [
    "ALL",
    "BY_NAME",
    "FP8LM",
    "L2SP",
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamMini",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "Apollo",
    "Attention",
    "BottleneckAdapter",
    "Checkpointing",
    "DoRA",
    "DyLoRA",
    "Freeze",
    "Fused",
    "Initialize",
    "KLToBase",
    "Lion",
    "LoRA",
    "LoRAFA",
    "OffloadActivations",
    "Packing",
    "Pad",
    "PagedAdamW8bit",
    "Peft",
    "Precision",
    "QALoRA",
    "Quantize",
    "RMSProp",
    "Run",
    "Stream",
    "SupervisedLoss",
    "WholeLoss",
    "complete",
]
