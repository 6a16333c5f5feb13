"""What a recipe leaves open, filled in: after `complete` every choice is visible and can be copied, changed, repeated.

Completing twice changes nothing.

References:
    The learning rate of adapters and its dependence on the hidden size follow "LoRA Without Regret" (Schulman et al.
    2025) as written down in the Tinker cookbook: 5e-5 * 10 * (2000 / hidden_size) ** 0.781 for Llama-like models; full
    fine-tuning takes a tenth of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from tunewise.errors import InputError
from tunewise.layers import native
from tunewise.layers.blocks import MODEL_TYPES
from tunewise.methods.attention import Attention, default_attention_kind
from tunewise.methods.fp8_lm import FP8LM
from tunewise.methods.fused import Fused
from tunewise.methods.lora import LoRA
from tunewise.methods.loss import SupervisedLoss, WholeLoss
from tunewise.methods.optimizers import AdamW
from tunewise.methods.packing import Packing
from tunewise.methods.peft import Peft
from tunewise.methods.precision import Precision, default_compute
from tunewise.methods.streaming import Stream
from tunewise.recipe import BatchSpec, CheckpointSpec, EvaluationSpec, Method, Recipe, Slot, TrainingSpec
from tunewise.workload.model import context_length
from tunewise.workload.prepare import default_max_length, resolved_too_long

DEFAULT_ROW_TOKENS = 2048
DEFAULT_DOCUMENTS = 16
DEFAULT_MICRO_BATCH_SIZE = 4
DEFAULT_EVALUATIONS = 10


def choose_device(name: str) -> torch.device:
    """Return the device that the recipe names, or for "auto" the best that is there.

    Raises:
        InputError: the named device is not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available[name]:
        raise InputError(
            f"device: '{name}' is not available here; there is: {', '.join(k for k in available if available[k])}."
        )
    return torch.device(name)


def complete(recipe: Recipe, config: PretrainedConfig, device: torch.device) -> Recipe:
    """Return `recipe` with everything filled in that does not depend on the data.

    Without `methods` a fine-tuning gets LoRA on all linear layers and packing; training from scratch gets packing. A
    recipe that lists methods gets exactly these, and of the slots that every run needs (precision, attention, loss,
    optimizer) the default where it names none. Who does not say how attention is computed leaves the kernels open too,
    and on a CPU gets the compiled ones where they are to be had (`default_kernels`).
    """
    max_length = recipe.data.max_length or default_max_length(context_length(config))
    data = recipe.data.model_copy(update={"max_length": max_length, "too_long": resolved_too_long(recipe)})
    methods = _complete_methods(recipe, config, device, max_length)
    evaluation = recipe.evaluation
    if evaluation.forgetting_budget is not None and evaluation.general_text is None:
        evaluation = evaluation.model_copy(update={"general_text": "default"})
    recipe = recipe.replace(methods=methods, device=device.type, data=data, evaluation=evaluation)
    return recipe.replace(batch=_complete_batch(recipe), training=_complete_training(recipe, config))


def default_kernels(methods: Sequence[Method], config: PretrainedConfig, device: torch.device) -> Fused | None:
    """Return the compiled kernels that these methods on this model get by default, if there is a compiler.

    They were faster in everything that was measured (`benchmarks/scale/run.py --only kernels`), but for attention in
    fp32, where torch's flash kernel is as fast or faster. peft's own kinds reach into modules that the kernels replace,
    so with them they are for who asks for them.
    """
    attention = next((method for method in methods if isinstance(method, Attention)), None)
    precision = next((method for method in methods if isinstance(method, Precision)), None)
    compute = default_compute(device) if precision is None else precision.compute
    suits = (
        device.type == "cpu"
        and config.model_type in MODEL_TYPES
        and type(config).__module__.startswith("transformers.")  # a model's own code may compute anything
        and not any(isinstance(method, Fused | Stream | Peft) for method in methods)
        and (attention is None or attention.kind == "per_document")
        and compute in ("fp32", "bf16")
    )
    return Fused(attention=compute == "bf16") if suits else None


def complete_intervals(recipe: Recipe, total_steps: int) -> Recipe:
    """Return `recipe` with the intervals of evaluation and saving filled in, which depend on the run's length."""
    every = max(1, total_steps // DEFAULT_EVALUATIONS)
    evaluation = EvaluationSpec(**{**recipe.evaluation.model_dump(), "every": recipe.evaluation.every or every})
    checkpoints = CheckpointSpec(**{**recipe.checkpoints.model_dump(), "every": recipe.checkpoints.every or every})
    return recipe.replace(evaluation=evaluation, checkpoints=checkpoints)


def _complete_methods(
    recipe: Recipe, config: PretrainedConfig, device: torch.device, max_length: int
) -> tuple[Method, ...]:
    chosen: list[Method]
    if recipe.methods is not None:
        chosen = list(recipe.methods)
    else:
        chosen = [Packing()] if recipe.objective == "pretrain" else [LoRA(), Packing()]
    slots = {method.slot for method in chosen}
    is_open = Slot.ATTENTION not in slots
    if Slot.PRECISION not in slots:
        keeps_masters = any(isinstance(method, FP8LM) for method in chosen)  # of its own
        chosen.append(Precision(compute=default_compute(device), trainable="same" if keeps_masters else "fp32"))
    prompts = any(isinstance(method, Peft) and method.is_prompt_learning for method in chosen)
    if Slot.ATTENTION not in slots:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
        kind = default_attention_kind(model_class, config)
        chosen.append(Attention(kind="sdpa" if prompts and kind == "per_document" else kind))
    if Slot.LOSS not in slots:
        chosen.append(WholeLoss() if prompts else SupervisedLoss())
    if Slot.OPTIMIZER not in slots:
        chosen.append(AdamW())
    kernels = default_kernels(chosen, config, device) if is_open else None
    if kernels is not None and native.why_not() is None:
        chosen.append(kernels)
    return tuple(
        method.model_copy(update={"row_tokens": max(max_length, DEFAULT_ROW_TOKENS)})
        if isinstance(method, Packing) and method.row_tokens is None
        else method
        for method in chosen
    )


def _complete_batch(recipe: Recipe) -> BatchSpec:
    batch = recipe.batch
    micro, steps, documents = batch.micro_batch_size, batch.gradient_accumulation_steps, batch.documents
    if recipe.get(Packing) is not None and steps is not None:
        raise InputError(
            "batch.gradient_accumulation_steps: with packing the number of rows differs from step to step; give "
            "batch.micro_batch_size (rows at once) and batch.documents (or supervised_tokens) instead."
        )
    if batch.supervised_tokens is not None and steps is not None:
        raise InputError(
            "batch.gradient_accumulation_steps: a batch of so many supervised tokens has a varying number of "
            "documents; give batch.micro_batch_size instead."
        )
    if documents is None and batch.supervised_tokens is None:
        documents = (micro or DEFAULT_MICRO_BATCH_SIZE) * steps if steps else DEFAULT_DOCUMENTS
    if micro is None:
        if recipe.get(Packing) is not None:
            micro = 1
        elif steps is not None and documents is not None:
            micro = -(-documents // steps)
            if -(-documents // micro) != steps:
                raise InputError(
                    f"batch: {documents} documents cannot be split evenly in {steps} micro-batches; give "
                    "batch.micro_batch_size, or a batch that is a multiple of gradient_accumulation_steps."
                )
        else:
            micro = min(documents or DEFAULT_MICRO_BATCH_SIZE, DEFAULT_MICRO_BATCH_SIZE)
    return BatchSpec(documents=documents, supervised_tokens=batch.supervised_tokens, micro_batch_size=micro)


def _complete_training(recipe: Recipe, config: PretrainedConfig) -> TrainingSpec:
    spec = recipe.training
    rate, epochs = spec.learning_rate, spec.epochs
    if rate is None:
        hidden_size = getattr(config, "hidden_size", None) or 2000
        adapter_rate = 5e-4 * (2000 / hidden_size) ** 0.781
        is_small = bool(recipe.in_slot(Slot.ADAPTER)) or recipe.objective == "pretrain"
        rate = float(f"{adapter_rate if is_small else adapter_rate / 10:.2g}")
    if epochs is None and spec.steps is None and spec.tokens is None:
        epochs = 3.0 if recipe.objective == "sft" else 1.0
    return TrainingSpec(**{**spec.model_dump(), "learning_rate": rate, "epochs": epochs})
