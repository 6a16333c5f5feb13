"""Unsloth: a file for `unsloth train --config`.

Read from unsloth 2026.10.9: `unsloth_cli/config.py` (its schema forbids unknown keys), `unsloth_cli/commands/train.py`
and `studio/backend/core/training/trainer.py`, which fixes what the schema does not name.
"""

from __future__ import annotations

import math
from typing import Any

from tunewise.engine.schedule import warmup_steps
from tunewise.export.peers import source as sources
from tunewise.export.peers import trainer_arguments as trainer
from tunewise.export.peers.adapters import integer_alpha, is_all_linear, refuse_other_adapters
from tunewise.export.peers.config import Case, Draft
from tunewise.export.peers.ledger import Ledger
from tunewise.export.peers.rows import step_rows
from tunewise.methods import AdamW8bit, Checkpointing, LoRA, Packing, Quantize
from tunewise.methods.defaults import DEFAULT_EVALUATIONS
from tunewise.methods.quantization import HEAD
from tunewise.recipe import Recipe, Slot

VERSION = "2026.10.9"
_FORMATS = {"alpaca": "alpaca", "messages": "chatml", "sharegpt": "sharegpt", "text": "raw"}
_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
_OPTIMIZER = "unsloth train always takes adamw_8bit with betas 0.9 and 0.999"


def draft(ledger: Ledger, case: Case) -> Draft:
    """Return the recipe in Unsloth's words.

    Raises:
        InputError: the recipe's data or its adapter mean nothing to Unsloth.
    """
    recipe = case.recipe
    refuse_other_adapters(ledger, recipe)
    content = {
        "model": _model(ledger, recipe),
        "data": _data(ledger, recipe),
        "training": _training(ledger, case),
    }
    if recipe.get(LoRA) is not None:
        content["lora"] = _adapter(ledger, recipe)
    content["logging"] = _logging(ledger, recipe)
    _name_what_is_fixed(ledger, recipe)
    return Draft(content, "unsloth train --config FILE")


def _model(ledger: Ledger, recipe: Recipe) -> str:
    for setting, same in (("tokenizer", None), ("revision", None), ("chat_template", None)):
        ledger.need(f"model.{setting}", same, otherwise="unsloth train takes what lies in the model's folder")
    ledger.need("model.resize_vocabulary", False, otherwise="unsloth train leaves the embedding as large as it is")
    ledger.need("model.weights", "pretrained", otherwise="unsloth train loads weights, it draws none")
    ledger.need("model.trust_remote_code", False, otherwise="unsloth train has no switch for it")
    ledger.need("model.allow_pickle", True, otherwise="unsloth train reads pickled weights where there are no others")
    ledger.need("device", "cuda", "auto", otherwise="unsloth train needs a GPU")
    return sources.model_path(ledger, recipe, "model")


def _data(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    source = sources.source_of(ledger, recipe, "data: dataset, local_dataset", "data: format_type")
    sources.columns_must_be(ledger, source, *source.fields)
    if source.format not in _FORMATS:
        ledger.miss("data.format", "unsloth train has no format of prompt and completion; it guesses by the columns")
    ledger.need("data.system_prompt", None, otherwise="unsloth train adds no system message")
    ledger.need("data.max_records", None, otherwise="unsloth train takes all records")
    ledger.need("data.validation", None, otherwise="unsloth train sets nothing aside and never evaluates")
    ledger.need("data.validation_fraction", 0.0, otherwise="unsloth train sets nothing aside and never evaluates")
    where = {"dataset": source.path} if source.is_hub else {"local_dataset": [source.path]}
    return {**where, "format_type": _FORMATS.get(source.format, "auto")}


def _training(ledger: Ledger, case: Case) -> dict[str, Any]:
    recipe = case.recipe
    packing = recipe.get(Packing)
    rows = step_rows(ledger, recipe, case.facts, "training: batch_size", "training: gradient_accumulation_steps")
    ledger.take("data.max_length", "training: max_seq_length")
    ledger.need("data.too_long", "cut", otherwise="unsloth train cuts long documents off")
    if packing is not None:
        ledger.take("packing", "training: packing")
        ledger.take("packing.row_tokens", "training: max_seq_length")
        ledger.miss("packing.pad_to", "unsloth train has no such option")
        if packing.row_tokens != recipe.data.max_length:
            ledger.miss("data.max_length", f"Unsloth has one length for rows and documents: {packing.row_tokens}")
    ledger.take("objective", "training: train_on_completions")
    ledger.take("training.learning_rate", "training: learning_rate")
    ledger.take("training.weight_decay", "training: weight_decay")
    ledger.take("out", "training: output_dir")
    return {
        "training_type": "lora" if recipe.get(LoRA) is not None else "full",
        "max_seq_length": rows.row_tokens,
        "load_in_4bit": _four_bits(ledger, recipe),
        "output_dir": case.out("unsloth"),
        **_length(ledger, case),
        "learning_rate": recipe.training.learning_rate,
        "batch_size": rows.micro_batch_size,
        "gradient_accumulation_steps": rows.accumulation,
        "warmup_steps": _warmup(ledger, case),
        "save_steps": _save_steps(ledger, case),
        "weight_decay": recipe.training.weight_decay,
        "random_seed": _seed(ledger),
        "packing": packing is not None,
        "train_on_completions": recipe.objective == "sft",
        "gradient_checkpointing": _checkpointing(ledger, recipe),
    }


def _seed(ledger: Ledger) -> int:
    seed = trainer.seed_of(ledger)
    ledger.mapped["seed"] = "training: random_seed"
    return seed


def _length(ledger: Ledger, case: Case) -> dict[str, int]:
    """Return whole epochs, and steps where the recipe or the plan knows them."""
    spec = case.recipe.training
    ledger.take("training.epochs", "training: num_epochs")
    ledger.take("training.steps", "training: max_steps")
    ledger.take("training.tokens", "training: max_steps")
    steps = spec.steps or (case.facts.num_steps if spec.tokens or (spec.epochs or 1.0) % 1 else None)
    epochs = max(1, math.ceil(spec.epochs or 1.0))
    if steps is None and spec.epochs is not None and spec.epochs != epochs:
        ledger.miss("training.epochs", f"Unsloth counts whole epochs; written as {epochs}")
    if steps is None and spec.tokens is not None:
        ledger.miss("training.tokens", "Unsloth counts epochs or steps; one epoch is written, set your own end")
    return {"num_epochs": epochs, "max_steps": steps or 0}


def _warmup(ledger: Ledger, case: Case) -> int:
    spec = case.recipe.training
    ledger.take("training.warmup", "training: warmup_steps")
    steps = spec.steps or case.facts.num_steps
    if spec.warmup >= 1 or spec.warmup == 0:
        return int(spec.warmup)
    if steps is None:
        ledger.miss("training.warmup", "Unsloth counts steps, and how many the run has is not known; written as none")
        return 0
    return warmup_steps(spec, steps)


def _save_steps(ledger: Ledger, case: Case) -> int:
    every = ledger.take("checkpoints.every", "training: save_steps")
    steps = case.recipe.training.steps or case.facts.num_steps
    if every is None and steps is None:
        ledger.miss("checkpoints.every", "a tenth of the run, whose steps are not known; saved at the end only")
    ledger.miss("checkpoints.keep", "unsloth train keeps every checkpoint")
    return int(every or (max(1, steps // DEFAULT_EVALUATIONS) if steps else 0))


def _checkpointing(ledger: Ledger, recipe: Recipe) -> str:
    if recipe.get(Checkpointing) is None:
        return "none"
    ledger.take("checkpointing", "training: gradient_checkpointing")
    ledger.need("checkpointing.every", 1, otherwise="Unsloth checkpoints every block")
    ledger.need("checkpointing.policy", "full", otherwise="Unsloth recomputes whole blocks")
    return "true"


def _four_bits(ledger: Ledger, recipe: Recipe) -> bool:
    quantize = recipe.get(Quantize)
    if quantize is None:
        return False
    ledger.take("quantize", "training: load_in_4bit")
    ledger.take("quantize.kind", "training: load_in_4bit")
    if quantize.kind != "nf4":
        ledger.miss("quantize.kind", "unsloth train has NF4 only; written as that")
    ledger.need("quantize.double_quant", None, True, otherwise="unsloth train quantizes the scales too")
    ledger.need("quantize.compute", "dequantize", otherwise="unsloth train multiplies with the unpacked weights")
    ledger.need("quantize.head_compute", "dense", otherwise="Unsloth computes the loss with the head as it is")
    ledger.need("quantize.block_size", None, 64, otherwise="bitsandbytes' blocks in transformers are 64 weights long")
    ledger.need("quantize.skip_modules", (HEAD,), otherwise="Unsloth chooses what to leave out itself")
    return True


def _adapter(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    lora = recipe.get(LoRA)
    assert lora is not None
    ledger.take("lora", "training: training_type")
    ledger.take("lora.target_modules", "lora: target_modules")
    targets = _LINEAR
    if isinstance(lora.target_modules, tuple):
        targets = ",".join(lora.target_modules)
    elif is_all_linear(lora):
        ledger.note(f"lora.target_modules: written as {_LINEAR}, the layers of models like Llama")
    else:
        ledger.miss("lora.target_modules", "unsloth train takes names, no expressions; written as all linear layers")
    ledger.need("lora.exclude_modules", (), otherwise="unsloth train leaves no module out; list those you want")
    ledger.need("lora.layers_to_transform", None, otherwise="unsloth train puts adapters into all layers")
    ledger.need("lora.lora_plus_ratio", None, otherwise="unsloth train has one learning rate for A and B")
    ledger.need("lora.init", "kaiming", otherwise="unsloth train starts A with Kaiming's uniform numbers")
    ledger.need("lora.modules_to_save", (), otherwise="unsloth train trains adapters only")
    return {
        "lora_r": ledger.take("lora.rank", "lora: lora_r"),
        "lora_alpha": integer_alpha(ledger, lora, "lora: lora_alpha"),
        "lora_dropout": ledger.take("lora.dropout", "lora: lora_dropout"),
        "target_modules": targets,
        "use_rslora": ledger.take("lora.use_rslora", "lora: use_rslora"),
    }


def _logging(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    ledger.take("report_to", "logging: enable_wandb, enable_tensorboard")
    others = [name for name in recipe.report_to if name not in ("wandb", "tensorboard")]
    if others:
        ledger.miss("report_to", f"unsloth train does not report to {', '.join(others)}")
    return {"enable_wandb": "wandb" in recipe.report_to, "enable_tensorboard": "tensorboard" in recipe.report_to}


def _name_what_is_fixed(ledger: Ledger, recipe: Recipe) -> None:
    """Name what `unsloth train` decides itself, where it decides otherwise than the recipe."""
    spec = recipe.training
    if spec.schedule != "linear":
        ledger.miss("training.schedule", "unsloth train always falls linearly")
    else:
        ledger.need("training.schedule", "linear", otherwise="")
    ledger.need("training.final_learning_rate", 0.0, otherwise="unsloth train ends at 0")
    ledger.need("training.max_grad_norm", 1.0, otherwise="unsloth train clips the gradients' norm at 1")
    trainer.name_guards(ledger, recipe, evaluates=False)
    (optimizer,) = recipe.in_slot(Slot.OPTIMIZER)
    plain = AdamW8bit()
    if isinstance(optimizer, AdamW8bit):
        ledger.take(optimizer.name, "fixed")
    else:
        ledger.miss(optimizer.name, _OPTIMIZER)
    for option in type(optimizer).model_fields:
        if isinstance(optimizer, AdamW8bit):
            ledger.need(f"{optimizer.name}.{option}", getattr(plain, option), otherwise=_OPTIMIZER)
        else:
            ledger.without_effect(f"{optimizer.name}.{option}")
    for setting in ("every", "keep_best", "patience", "micro_batch_size"):
        ledger.without_effect(f"evaluation.{setting}")
    ledger.miss("attention.kind", "Unsloth chooses the attention itself")
    ledger.without_effect("attention")
    ledger.need(
        "precision.compute", "bf16", otherwise="unsloth train computes in bf16, or in fp16 where a GPU has none"
    )
    ledger.without_effect("precision")
    ledger.miss("precision.trainable", "Unsloth chooses the dtype of what is trained itself")
    if ledger.has("whole_loss"):
        ledger.miss("whole_loss", "Unsloth has a fused loss of its own, with less memory")
    else:
        ledger.take("supervised_loss", "fixed")
        ledger.miss("supervised_loss.chunk_tokens", "Unsloth chooses the chunks of its fused loss itself")
